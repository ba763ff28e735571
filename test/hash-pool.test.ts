import { EventEmitter } from 'node:events'
import { readdirSync, readFileSync } from 'node:fs'
import { readFile, rm, writeFile } from 'node:fs/promises'
import { syncBuiltinESMExports } from 'node:module'
import { type AddressInfo, connect, type Socket } from 'node:net'
import { constants, getPriority } from 'node:os'
import { join } from 'node:path'
import { PassThrough } from 'node:stream'
import { setImmediate as endOfPass } from 'node:timers/promises'
import workerThreads, { type Worker } from 'node:worker_threads'
import { verify } from '@node-rs/argon2'
import type { FastifyInstance } from 'fastify'
import t, { type Test } from 'tap'
import type { Environment } from '../dist/config/config.js'
import { Refusal } from '../dist/outcomes.js'
import { ClientDisconnected, HashPool } from '../dist/passwords/hash-pool.js'
import { copyBuild } from '../testkit/built-copy.js'
import { client, statusAndErrno } from '../testkit/client.js'
import { type SignUpBody, startTestbed } from '../testkit/testbed.js'
import { retried, until } from '../testkit/until.js'

const { build, issueCode, redis, signUpBody, userRows } = await startTestbed(t)

const cheapHash = { memoryCost: 64, timeCost: 1, parallelism: 1 }

/**
 * Its verification takes a thread about 200 ms, so that a client can disconnect while other jobs wait. Not more, because
 * on a busy machine the low priority of the thread makes that many seconds.
 */
const slowPhc = '$argon2id$v=19$m=65536,t=8,p=1$c29tZSBzYWx0Li4u$MTIzNDU2Nzg5MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTI'

function startPool(t: Test, size: number): HashPool {
  const pool = new HashPool(size, cheapHash)
  t.teardown(() => pool.close())
  return pool
}

/** Starts a pool, and collects its threads, also those that it starts later. */
function startWatchedPool(t: Test, size: number): { pool: HashPool; workers: Worker[] } {
  const workers = watchWorkers(t)
  return { pool: startPool(t, size), workers }
}

/** Collects the threads that are started during a test. */
function watchWorkers(t: Test): Worker[] {
  const workers: Worker[] = []
  const onWorker = (worker: Worker) => workers.push(worker)
  process.on('worker', onWorker)
  t.teardown(() => process.off('worker', onWorker))
  return workers
}

/** Records which thread gets each of the next jobs. Returns a list to which the index of the thread is added. */
function recordJobs(workers: readonly Worker[]): number[] {
  const jobs: number[] = []
  for (const [index, worker] of workers.entries()) {
    const { postMessage } = worker
    worker.postMessage = (message) => {
      jobs.push(index)
      postMessage.call(worker, message)
    }
  }
  return jobs
}

/** Holds the jobs that the only thread gets, as if it were busy. */
function holdJobs([worker]: readonly Worker[]) {
  if (worker === undefined) throw new Error('no thread has been started')
  const { postMessage } = worker
  const held: unknown[] = []
  worker.postMessage = (message) => held.push(message)
  return {
    /** Lets the thread compute the oldest job. */
    releaseOne: () => postMessage.call(worker, held.shift()),
    releaseAll() {
      worker.postMessage = postMessage
      for (const message of held) postMessage.call(worker, message)
    }
  }
}

/** Fails as with `ulimit -u`: the constructor throws, and there is no event. */
class RefusedWorker {
  constructor() {
    throw new Error('ERR_WORKER_INIT_FAILED: EAGAIN')
  }
}

/** A thread that never becomes ready. */
class StartingWorker extends EventEmitter {
  terminate = async () => this.emit('exit')
}

/**
 * Replaces the class of the threads that are started from now on.
 *
 * @returns a function that restores the real class
 */
function replaceWorkers(t: Test, replacement: object): () => void {
  const { Worker } = workerThreads
  function use(workerClass: object): void {
    Object.assign(workerThreads, { Worker: workerClass })
    syncBuiltinESMExports()
  }
  use(replacement)
  const restore = () => use(Worker)
  t.teardown(restore)
  return restore
}

t.test('the pool hashes and verifies, and a job that fails does not stop it', async (t) => {
  const pool = startPool(t, 2)
  const phc = await pool.hash('a password')
  t.match(phc, /^\$argon2id\$v=19\$m=64,t=1,p=1\$/)
  t.ok(await verify(phc, 'a password'))
  t.equal(await pool.verify(phc, 'a password'), true)
  t.equal(await pool.verify(phc, 'another'), false)
  await t.rejects(pool.verify('no PHC string', 'a password'))
  t.equal(await pool.verify(phc, 'a password'), true, 'after a failure')
})

t.test('hashes and verifications are served first come, first served', async (t) => {
  const pool = startPool(t, 1)
  const phc = await pool.hash('a password')
  const finished: number[] = []
  await Promise.all(
    Array.from({ length: 40 }, async (_, index) => {
      await (index % 3 === 0 ? pool.verify(phc, 'a password') : pool.hash('a password'))
      finished.push(index)
    })
  )
  t.strictSame(finished, [...finished.keys()])
})

t.test(
  'the threads of the pool have a lower priority than the event loop',
  { skip: process.platform !== 'linux' },
  async (t) => {
    // Field 19 of stat is the nice value. The name in field 2 may contain spaces (proc(5)).
    const niceValues = () =>
      readdirSync('/proc/self/task').map((threadId) =>
        Number(readFileSync(`/proc/self/task/${threadId}/stat`, 'utf8').split(') ')[1]?.split(' ')[16])
      )
    await startPool(t, 3).ready()
    const expected = Math.min(constants.priority.PRIORITY_LOW, getPriority() + 10)
    t.equal(niceValues().filter((value) => value === expected).length, 3)
  }
)

t.test('closing the pool finishes the queue', async (t) => {
  const pool = new HashPool(1, cheapHash)
  const jobs = Array.from({ length: 20 }, () => pool.hash('a password'))
  await pool.close()
  t.equal((await Promise.all(jobs)).length, 20)
  t.match(await pool.hash('a password').catch((error) => error), { outcome: 'busy' })
})

t.test('a pool with invalid parameters does not become ready', async (t) => {
  const pool = new HashPool(1, { memoryCost: 1, timeCost: 1, parallelism: 1 })
  t.teardown(() => pool.close())
  await t.rejects(pool.ready(), /[Mm]emory/)
})

t.test(
  'a client that disconnects removes its job from the queue, unless a thread has begun it or has it next',
  async (t) => {
    const pool = startPool(t, 1)
    await pool.ready()
    const clients = [new PassThrough(), new PassThrough(), new PassThrough()] as const
    const begun = pool.verify(slowPhc, 'begun', clients[0])
    const next = pool.verify(slowPhc, 'next', clients[1])
    const waiting = pool.hash('waiting', clients[2])
    t.equal(pool.queueLength, 2)
    const expectedWaitMs = pool.expectedWaitMs
    clients[2].destroy()
    await t.rejects(waiting, new ClientDisconnected())
    t.equal(pool.queueLength, 1)
    t.equal(pool.expectedWaitMs, expectedWaitMs / 2)
    for (const client of clients) client.destroy()
    t.strictSame(await Promise.all([begun, next]), [false, false])
    t.equal(pool.expectedWaitMs, 0)
    const late = await pool.hash('late', clients[2]).catch((error) => error)
    t.type(late, ClientDisconnected, 'a client that has disconnected before adds no job')
    t.equal(late.outcome, 'busy')
  }
)

t.test('a thread has its next job before it has finished one; idle threads come first', async (t) => {
  const { workers, pool } = startWatchedPool(t, 2)
  await pool.ready()
  const jobs = recordJobs(workers)
  const hashes = ['first', 'second', 'third', 'fourth', 'fifth'].map((password) => pool.hash(password))
  t.strictSame(
    [jobs.slice(0, 2).sort(), jobs.slice(2).sort()],
    [
      [0, 1],
      [0, 1]
    ],
    'no thread has two jobs in advance'
  )
  await Promise.all(hashes)
  t.equal(jobs.length, 5)
})

t.test('a job goes to the idle thread, whichever it is', async (t) => {
  const { workers, pool } = startWatchedPool(t, 2)
  await pool.ready()
  const jobs = recordJobs(workers)
  const idle = new Set<number | undefined>()
  // Of two idle threads, the one that became idle first gets the next job. So the slow job alternates between them.
  while (idle.size < workers.length) {
    jobs.length = 0
    const slow = pool.verify(slowPhc, 'slow')
    await pool.hash('fast')
    await Promise.all([slow, pool.hash('next')])
    t.equal(jobs[2], jobs[1])
    idle.add(jobs[1])
  }
})

t.test('an observer learns how long each job has waited and computed', async (t) => {
  const pool = startPool(t, 1)
  await pool.ready()
  const jobs: { waitMs: number; durationMs: number }[] = []
  pool.onJob = (waitMs, durationMs) => jobs.push({ waitMs, durationMs })
  const startedAt = performance.now()
  await Promise.all([pool.verify(slowPhc, 'slow'), pool.hash('a password')])
  const elapsedMs = performance.now() - startedAt
  t.equal(jobs.length, 2)
  for (const { waitMs, durationMs } of jobs) {
    t.ok(waitMs >= 0 && durationMs > 0 && waitMs + durationMs <= elapsedMs, `${waitMs} + ${durationMs} ms`)
  }
})

t.test('if a thread ends, another one computes the job that it had next', async (t) => {
  const { workers, pool } = startWatchedPool(t, 1)
  await pool.ready()
  const begun = pool.verify(slowPhc, 'begun')
  const others = ['next', 'waiting'].map((password) => pool.hash(password))
  const finished: string[] = []
  for (const [index, hash] of others.entries()) hash.then(() => finished.push(['next', 'waiting'][index] ?? ''))
  await Promise.all([t.rejects(begun, /has ended/), workers[0]?.terminate()])
  await Promise.all(others)
  t.strictSame(finished, ['next', 'waiting'], 'in their order')
})

t.test('if a thread ends, a job that it had next is not computed if its client has gone', async (t) => {
  const { workers, pool } = startWatchedPool(t, 1)
  await pool.ready()
  const client = new PassThrough()
  const begun = pool.verify(slowPhc, 'begun')
  const next = pool.hash('next', client)
  client.destroy()
  await Promise.all([t.rejects(begun, /has ended/), t.rejects(next, new ClientDisconnected()), workers[0]?.terminate()])
  t.equal(pool.queueLength, 0)
})

t.test('the error that ends a thread is that of the job that it computed, not of one before', async (t) => {
  const copy = await copyBuild()
  t.teardown(() => rm(copy, { recursive: true }))
  const threadFile = join(copy, 'dist/passwords/hash-thread.js')
  const compute = 'function compute() {'
  const text = await readFile(threadFile, 'utf8')
  t.ok(text.includes(compute))
  await writeFile(
    threadFile,
    text.replaceAll(compute, `if (password === 'fatal') throw new Error('fatal')\n${compute}`)
  )
  const { HashPool }: typeof import('../dist/passwords/hash-pool.js') = await import(
    join(copy, 'dist/passwords/hash-pool.js')
  )
  const pool = new HashPool(1, cheapHash)
  t.teardown(() => pool.close())
  const errors: unknown[] = []
  pool.onThreadError = (error) => errors.push(error)
  await pool.ready()
  const first = pool.hash('a password')
  const fatal = pool.hash('fatal')
  // Meanwhile the thread computes both, so that the result and the error arrive together.
  Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 300)
  await Promise.all([t.resolves(first), t.rejects(fatal, /^fatal$/)])
  t.match(errors, [/fatal/])
  t.type(await pool.hash('a password'), 'string', 'another thread has replaced it')
})

t.test('threads that cannot start are started again with growing pauses; meanwhile nobody loses a code', async (t) => {
  // A copy of the service, whose threads can be broken.
  const copy = await copyBuild()
  t.teardown(() => rm(copy, { recursive: true }))
  const threadFile = join(copy, 'dist/passwords/hash-thread.js')
  const working = await readFile(threadFile, 'utf8')
  const { passwords }: typeof import('../dist/passwords/passwords.js') = await import(
    join(copy, 'dist/passwords/passwords.js')
  )
  const workers = watchWorkers(t)
  const app = await build(t, { HASH_THREADS: '2' }, { overrides: { passwords } })
  const { signUp } = client(app)
  /** Waits until a probe is answered so. On a busy machine a store may fail a probe. */
  const untilReadyIs = (status: number, failing: string) =>
    until(`ready is ${status} ${failing}`, async () => {
      const reply = await app.inject('/health/ready')
      return reply.statusCode === status && `${reply.json().data.failing}` === failing
    })
  await untilReadyIs(200, '')
  const starts = join(copy, 'starts')
  await writeFile(
    threadFile,
    `import { appendFileSync } from 'node:fs'
     appendFileSync(${JSON.stringify(starts)}, Date.now() + '\\n')
     throw new Error('no memory for a thread')`
  )
  for (const worker of workers.slice()) await worker.terminate()
  await until('no thread can start', () => !app.passwords.isAvailable)
  await untilReadyIs(503, 'hash threads')
  const body = await signUpBody()
  const refused = await signUp(body)
  t.strictSame([...statusAndErrno(refused), refused.headers['retry-after']], [503, '4500', '5'])
  t.equal(await redis.get(`sms_code_${body.mobile}`), body.sms_code)

  const startTimes = async () => (await readFile(starts, 'utf8')).trim().split('\n').map(Number)
  await until('both threads have been started three times', async () => (await startTimes()).length >= 6)
  const [first = 0, , , , , sixth = 0] = await startTimes()
  // Each failure doubles the next pause: 100, 200, 400, 800 ms. The pauses of the two threads overlap.
  t.ok(sixth - first >= 800, `${sixth - first} ms`)

  await writeFile(threadFile, working)
  t.equal((await retried(() => signUp(body))).statusCode, 201)
  await untilReadyIs(200, '')
})

t.test('a thread that the operating system refuses is started again later', async (t) => {
  const { workers, pool } = startWatchedPool(t, 1)
  const errors: unknown[] = []
  pool.onThreadError = (error) => errors.push(error)
  await pool.ready()
  const allow = replaceWorkers(t, RefusedWorker)
  await workers[0]?.terminate()
  await until('the second start has failed, too', () => errors.length >= 2)
  t.equal(pool.isAvailable, false)
  await t.rejects(pool.hash('a password'), new Refusal('busy', undefined, { retryAfterSeconds: 5 }))
  allow()
  await until('a thread has started', () => pool.isAvailable)
  t.match(await pool.hash('a password'), /^\$argon2id\$/)
})

t.test('a pool stays available while one of its threads works', async (t) => {
  const { workers, pool } = startWatchedPool(t, 2)
  const errors: unknown[] = []
  pool.onThreadError = (error) => errors.push(error)
  await pool.ready()
  replaceWorkers(t, RefusedWorker)
  await workers[0]?.terminate()
  await until('the second start has failed, too', () => errors.length >= 2)
  t.equal(pool.isAvailable, true)
  t.match(await pool.hash('a password'), /^\$argon2id\$/)
})

t.test('a pool is unavailable if a thread cannot start while the others have not started', async (t) => {
  const { workers, pool } = startWatchedPool(t, 2)
  await pool.ready()
  replaceWorkers(t, StartingWorker)
  await workers[0]?.terminate()
  t.equal(pool.isAvailable, true)
  replaceWorkers(t, RefusedWorker)
  await workers[1]?.terminate()
  t.equal(pool.isAvailable, false)
})

t.test('a pool that is closed before a thread is started again starts none', async (t) => {
  const { workers, pool } = startWatchedPool(t, 1)
  await pool.ready()
  const allow = replaceWorkers(t, RefusedWorker)
  const restarts: (() => void)[] = []
  const restoreTimers = t.intercept(globalThis, 'setTimeout', {
    value: (restart: () => void) => {
      restarts.push(restart)
      return { unref: () => undefined }
    }
  }).restore
  // Nobody listens to the errors of this pool.
  workers[0]?.emit('error', new Error('out of memory'))
  await workers[0]?.terminate()
  restoreTimers()
  allow()
  t.equal(restarts.length, 1)
  await pool.close()
  restarts[0]?.()
  // Node reports a new thread in the next tick.
  await endOfPass()
  t.equal(workers.length, 1)
})

/** The settings of an instance with one thread, whose requests do not time out. */
const oneThread = { HASH_THREADS: '1' }

/** Builds an instance with one thread, whose jobs are held. */
async function buildHeld(t: Test, env: Environment) {
  const workers = watchWorkers(t)
  const app = await build(t, { ...oneThread, ...env })
  return { app, jobs: holdJobs(workers) }
}

/** Gives a thread a job of somebody else. */
const occupyThread = ({ passwords }: FastifyInstance) => passwords.hash('a password', new PassThrough())

/** Sends a sign-up on a connection of its own. */
function sendSignUp({ server }: FastifyInstance, body: SignUpBody): Socket {
  const { port } = server.address() as AddressInfo
  const json = JSON.stringify(body)
  const socket = connect(port, '127.0.0.1')
  socket.write(
    'POST /api/v1.0/users HTTP/1.1\r\nHost: service\r\nContent-Type: application/json\r\n' +
      `Content-Length: ${json.length}\r\n\r\n${json}`
  )
  return socket
}

t.test('G6: a sign-up whose hash would wait too long gets 503 4500 at once, and its code is not touched', async (t) => {
  const { app, jobs } = await buildHeld(t, { HASH_MAX_WAIT_MS: '0' })
  const { signUp } = client(app)
  const [first, second, third] = [await signUpBody(), await signUpBody(), await signUpBody()]
  const occupied = occupyThread(app)
  // Both are admitted, because nothing waits yet.
  const admitted = [signUp(first), signUp(second)]
  await until('both sign-ups wait for the thread', () => app.passwords.queueLength === 2)

  const refused = await signUp(third)
  t.equal(app.passwords.queueLength, 2, 'the answer does not wait for the queue')
  t.strictSame([refused.statusCode, refused.json()], [503, { errno: '4500', errmsg: '服务繁忙，请稍后重试' }])
  t.match(refused.headers['retry-after'], /^[1-9]\d*$/)
  t.equal(await redis.get(`sms_code_${third.mobile}`), third.sms_code)

  jobs.releaseAll()
  await occupied
  for (const reply of admitted) t.equal((await reply).statusCode, 201, 'a request that has claimed its code is hashed')
  t.equal((await retried(() => signUp(third))).statusCode, 201, 'later the refused request succeeds')
})

t.test('G6: admission reserves nothing, so wrong codes do not displace a right one', async (t) => {
  const { signUp } = client(
    await build(t, { ...oneThread, HASH_MAX_WAIT_MS: '0', SMS_CODE_ATTEMPTS: '1000', SMS_GUESS_DAILY_MAX: '1000' })
  )
  const [right, wrong] = [await signUpBody(), await signUpBody()]
  const wrongCodes = Array.from({ length: 1_000 }, () => signUp({ ...wrong, sms_code: 'wrong' }))
  t.equal((await signUp(right)).statusCode, 201)
  for (const reply of await Promise.all(wrongCodes)) t.strictSame(statusAndErrno(reply), [422, '4004'])
})

t.test('a client that disconnects while its sign-up waits is not hashed, and its code is restored', async (t) => {
  const { app, jobs } = await buildHeld(t, { HASH_MAX_WAIT_MS: '600000' })
  await app.listen({ port: 0 })
  const { signUp } = client(app)
  const [disconnecting, replaced] = [await signUpBody(), await signUpBody()]
  await redis.pexpire(`sms_code_${disconnecting.mobile}`, 100_000)
  const occupied = [occupyThread(app), occupyThread(app)]
  const sockets = [sendSignUp(app, disconnecting), sendSignUp(app, replaced)]
  await until('both sign-ups wait, and neither is the next', () => app.passwords.queueLength === 3)
  const newerCode = await issueCode(replaced.mobile)
  for (const socket of sockets) socket.destroy()
  await until('the code is restored', async () => (await redis.exists(`sms_code_${disconnecting.mobile}`)) === 1)
  t.equal(await redis.get(`sms_code_${disconnecting.mobile}`), disconnecting.sms_code)
  const ttlMs = await redis.pttl(`sms_code_${disconnecting.mobile}`)
  t.ok(ttlMs > 0 && ttlMs <= 100_000, 'the code has its remaining TTL')

  jobs.releaseAll()
  await Promise.all(occupied)
  t.strictSame([await userRows(disconnecting.mobile), await userRows(replaced.mobile)], [[], []], 'nothing is written')
  t.equal(await redis.get(`sms_code_${replaced.mobile}`), newerCode, 'a newer code is not overwritten')
  t.equal((await signUp(disconnecting)).statusCode, 201, 'the code still works')
})

t.test('shutdown waits for sign-ups whose clients have disconnected, and restores their codes', async (t) => {
  const { app, jobs } = await buildHeld(t, { HASH_MAX_WAIT_MS: '600000' })
  await app.listen({ port: 0 })
  const [started, waiting] = [await signUpBody(), await signUpBody()]
  const occupied = occupyThread(app)
  const first = sendSignUp(app, started)
  await until('the first sign-up waits', () => app.passwords.queueLength === 1)
  const occupiedAfterFirst = [occupyThread(app), occupyThread(app)]
  const second = sendSignUp(app, waiting)
  await until('the second sign-up waits', () => app.passwords.queueLength === 4)
  // Now it is the turn of the first sign-up.
  jobs.releaseOne()
  await occupied
  for (const socket of [first, second]) socket.destroy()
  const closed = app.close()
  await until('the code is restored', async () => (await redis.exists(`sms_code_${waiting.mobile}`)) === 1)
  jobs.releaseAll()
  await Promise.all([closed, ...occupiedAfterFirst])
  t.equal(await redis.get(`sms_code_${waiting.mobile}`), waiting.sms_code)
  t.equal((await userRows(started.mobile)).length, 1, 'a hash that has started is finished, and its row is written')
})
