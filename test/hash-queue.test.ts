import { type AddressInfo, connect, type Socket } from 'node:net'
import { PassThrough, type Writable } from 'node:stream'
import { setImmediate as startedJobs } from 'node:timers/promises'
import { verify } from '@node-rs/argon2'
import type { FastifyInstance } from 'fastify'
import t, { type Test } from 'tap'
import { ClientDisconnected, HashQueue, QueueFull } from '#src/passwords/hash-queue.js'
import { client, statusAndErrno } from '../testkit/client.js'
import { type SignUpBody, startTestbed } from '../testkit/testbed.js'
import { retried, until } from '../testkit/until.js'

const { build, holdRedisWrites, redis, signUpBody, userRows } = await startTestbed(t)

/** A queue, and jobs that run until they are ended. */
function startQueue(threads: number, maxWaitMs = 0) {
  const queue = new HashQueue(threads, maxWaitMs)
  const started: string[] = []
  const ends = new Map<string, (error?: Error) => void>()
  return {
    queue,
    /** The jobs that have started, in order. */
    started,
    run(name: string, client?: Writable): Promise<string> {
      const job = () =>
        new Promise<string>((resolve, reject) => {
          started.push(name)
          ends.set(name, (error) => (error === undefined ? resolve(name) : reject(error)))
        })
      return queue.run(job, client)
    },
    end: (name: string, error?: Error) => ends.get(name)?.(error)
  }
}

/** From now on every hash of an application holds its thread until all are released, at the latest after the test. */
function holdHashes(t: Test): { release(): void } {
  let release = (): void => undefined
  const released = new Promise<void>((resolve) => {
    release = resolve
  })
  const { run } = HashQueue.prototype
  t.intercept(HashQueue.prototype, 'run', {
    value(this: HashQueue, job: () => Promise<unknown>, client?: Writable) {
      return run.call(this, () => released.then(job), client)
    }
  })
  t.teardown(release)
  return { release }
}

const errorsIn = (lines: readonly string[]) => lines.filter((line) => JSON.parse(line).level > 30)

/** Sends sign-ups on one connection, without waiting for answers. */
function pipeline({ server }: FastifyInstance, ...bodies: SignUpBody[]): Socket {
  const { port } = server.address() as AddressInfo
  const requests = bodies.map((body) => {
    const json = JSON.stringify(body)
    return (
      'POST /api/v1.0/users HTTP/1.1\r\nHost: service\r\nContent-Type: application/json\r\n' +
      `Content-Length: ${json.length}\r\n\r\n${json}`
    )
  })
  const socket = connect(port, '127.0.0.1')
  socket.write(requests.join(''))
  return socket
}

t.test('G6: jobs start first come, first served, and only as many run as there are threads', async (t) => {
  const { started, run, end } = startQueue(2)
  for (const name of ['a', 'b', 'c', 'd']) run(name)
  await startedJobs()
  t.strictSame(started, ['a', 'b'])
  end('b')
  await startedJobs()
  t.strictSame(started, ['a', 'b', 'c'])
  end('c')
  await startedJobs()
  t.strictSame(started, ['a', 'b', 'c', 'd'])
})

t.test('a job that fails rejects alone, and gives its thread to the next', async (t) => {
  const { run, end } = startQueue(1)
  const [first, second] = [run('first'), run('second')]
  await startedJobs()
  end('first', new Error('no memory'))
  await t.rejects(first, /no memory/)
  end('second')
  t.equal(await second, 'second')
})

t.test('the job of a client that disconnects leaves the queue; one that runs is finished', async (t) => {
  const { queue, started, run, end } = startQueue(1)
  const clients = [new PassThrough(), new PassThrough(), new PassThrough()] as const
  const [running, waiting, last] = [run('a', clients[0]), run('b', clients[1]), run('c', clients[2])]
  await startedJobs()
  t.equal(queue.queueLength, 2)
  clients[0].destroy()
  clients[1].destroy()
  await t.rejects(waiting, new ClientDisconnected())
  t.equal(queue.queueLength, 1)
  end('a')
  t.equal(await running, 'a')
  end('c')
  t.equal(await last, 'c')
  await t.rejects(run('d', clients[1]), new ClientDisconnected(), 'a client that has disconnected before adds no job')
  t.strictSame(started, ['a', 'c'])
})

t.test('a closing queue finishes its jobs and refuses later ones', async (t) => {
  const { queue, run, end } = startQueue(1)
  const jobs = [run('a'), run('b')]
  await startedJobs()
  const closed = queue.close().then(() => 'closed')
  await t.rejects(run('late'), new QueueFull(1))
  t.throws(() => queue.admit(), new QueueFull(1))
  end('a')
  await jobs[0]
  t.equal(await Promise.race([closed, 'not yet']), 'not yet')
  end('b')
  t.strictSame(await Promise.all([...jobs, closed]), ['a', 'b', 'closed'])
})

t.test('the expected wait counts admitted requests as if they had joined the queue', async (t) => {
  const { queue, run, end } = startQueue(2, 1_000)
  let averageMs = 0
  queue.onJob = (_waitMs, durationMs) => {
    averageMs = durationMs
  }
  const first = run('first')
  await startedJobs()
  const startedAt = performance.now()
  await until('some time has passed', () => performance.now() - startedAt > 20)
  end('first')
  await first
  t.ok(averageMs >= 20, `${averageMs} ms`)

  const clients = Array.from({ length: 4 }, () => new PassThrough())
  for (const client of clients) queue.admit(client)
  t.equal(queue.expectedWaitMs, (2 * averageMs) / 2, 'two of them have a thread')
  for (const [index, client] of clients.entries()) run(`${index}`, client)
  t.equal(queue.expectedWaitMs, (2 * averageMs) / 2, 'who has joined counts once')
  const other = new PassThrough()
  queue.admit(other)
  t.equal(queue.expectedWaitMs, (3 * averageMs) / 2)
  queue.release(other)
  queue.admit()
  t.equal(queue.expectedWaitMs, (2 * averageMs) / 2, 'without a client nothing counts')

  // The excess in whole seconds.
  while (queue.expectedWaitMs <= 2_500) run('more')
  t.throws(() => queue.admit(other), new QueueFull(Math.ceil((queue.expectedWaitMs - 1_000) / 1_000)))
})

t.test('G6: a sign-up whose hash would wait too long gets 503 4500 at once, and its code is not touched', async (t) => {
  const lines: string[] = []
  const app = await build(t, { HASH_MAX_WAIT_MS: '0' }, { logStream: { write: (line) => lines.push(line) } })
  const { signUp } = client(app)
  const hashes = holdHashes(t)
  const [first, second, third] = [await signUpBody(), await signUpBody(), await signUpBody()]
  // Both are admitted, because nothing waits yet.
  const admitted = [signUp(first), signUp(second)]
  await until('one is hashed, and one waits', () => app.mobileSignup.passwords.queueLength === 1)
  const refused = await signUp(third)
  t.strictSame([refused.statusCode, refused.json()], [503, { errno: '4500', errmsg: '服务繁忙，请稍后重试' }])
  t.match(refused.headers['retry-after'], /^[1-9]\d*$/)
  t.equal(app.mobileSignup.passwords.queueLength, 1, 'the answer does not wait for the queue')
  t.equal(await redis.get(`sms_code_${third.mobile}`), third.sms_code)
  t.strictSame(errorsIn(lines), [])

  hashes.release()
  for (const reply of admitted) t.equal((await reply).statusCode, 201, 'a request that holds its code is hashed')
  t.equal((await retried(() => signUp(third))).statusCode, 201, 'later the refused request succeeds')
})

t.test('G6: requests that wait for Redis count: the next is refused while the queue is still empty', async (t) => {
  const app = await build(t, { HASH_MAX_WAIT_MS: '0' })
  const { logIn, signUp } = client(app)
  const bodies = [await signUpBody(), await signUpBody()]
  const third = await signUpBody()
  const writes = await holdRedisWrites(t)
  const admitted = bodies.map((body) => signUp(body))
  await until('both are admitted', () => app.mobileSignup.passwords.expectedWaitMs > 0)
  t.strictSame(statusAndErrno(await signUp(third)), [503, '4500'])
  t.strictSame(statusAndErrno(await logIn(third)), [503, '4500'])
  t.equal(app.mobileSignup.passwords.queueLength, 0)
  await writes.release()
  for (const reply of admitted) t.equal((await reply).statusCode, 201)
  t.equal(app.mobileSignup.passwords.expectedWaitMs, 0)
  t.equal((await signUp(third)).statusCode, 201)
})

t.test('G6: a request that is answered without a hash frees its place', async (t) => {
  const app = await build(t, { HASH_MAX_WAIT_MS: '0', SMS_CODE_ATTEMPTS: '1000' })
  const { signUp } = client(app)
  const body = await signUpBody()
  for (let n = 0; n < 5; n++) t.strictSame(statusAndErrno(await signUp({ ...body, sms_code: 'wrong' })), [422, '4004'])
  t.equal((await signUp(body)).statusCode, 201)
})

t.test('G6: so does one whose answer is never sent, because its connection dies before its turn', async (t) => {
  const app = await build(t, { HASH_MAX_WAIT_MS: '600000' })
  await app.listen({ port: 0, host: '127.0.0.1' })
  const hashes = holdHashes(t)
  const admits = t.capture(app.mobileSignup.passwords, 'admit', app.mobileSignup.passwords.admit)
  const wrong = { ...(await signUpBody()), sms_code: 'wrong' }
  const socket = pipeline(app, await signUpBody(), wrong, wrong, wrong)
  let admitted = 0
  await until('all are admitted, and only the first is hashed', () => {
    admitted += admits().length
    return admitted === 4 && app.mobileSignup.passwords.expectedWaitMs === 0
  })
  socket.destroy()
  hashes.release()
})

t.test('a client that disconnects while its hash waits is counted as that, and its code still works', async (t) => {
  const lines: string[] = []
  const app = await build(t, { METRICS_PORT: '0' }, { logStream: { write: (line) => lines.push(line) } })
  await app.listen({ port: 0, host: '127.0.0.1' })
  const hashes = holdHashes(t)
  const occupied = app.mobileSignup.passwords.hash('a password')
  const body = await signUpBody()
  const socket = pipeline(app, body)
  await until('its hash waits', () => app.mobileSignup.passwords.queueLength === 1)
  socket.destroy()
  const outcomes = () => lines.flatMap((line) => JSON.parse(line).outcome ?? [])
  await until('it is logged', () => outcomes().length > 0)
  t.strictSame(outcomes(), ['client_disconnected'])
  t.strictSame(errorsIn(lines), [])
  const metrics = await (await fetch(app.metricsUrl ?? '')).text()
  t.match(metrics, /_count\{method="POST",route="\/api\/v1\.0\/users",outcome="client_disconnected"\} 1\n/)
  t.equal(app.mobileSignup.passwords.queueLength, 0)
  hashes.release()
  await occupied
  t.strictSame(await userRows(body.mobile), [], 'nothing is written')
  t.equal((await client(app).signUp(body)).statusCode, 201)
})

t.test('a shutdown finishes the sign-up that is hashed, also when its client has disconnected', async (t) => {
  const app = await build(t)
  await app.listen({ port: 0, host: '127.0.0.1' })
  const hashes = holdHashes(t)
  const [hashed, waiting] = [await signUpBody(), await signUpBody()]
  const sockets = [pipeline(app, hashed)]
  await until('the first is admitted', async () => (await redis.exists(`sms_code_${hashed.mobile}`)) === 0)
  sockets.push(pipeline(app, waiting))
  await until('the second waits', () => app.mobileSignup.passwords.queueLength === 1)
  for (const socket of sockets) socket.destroy()
  await until('it has left', () => app.mobileSignup.passwords.queueLength === 0)
  const closed = app.close()
  hashes.release()
  await closed
  t.equal((await userRows(hashed.mobile)).length, 1)
  t.strictSame(await userRows(waiting.mobile), [])
  t.equal((await client(await build(t)).signUp(waiting)).statusCode, 201, 'the code of the other still works')
})

t.test('passwords count in NFKC; that of an unknown user is verified, too, and never matches', async (t) => {
  const { passwords } = (await build(t)).mobileSignup
  const phc = await passwords.hash('ｐａｓｓｗｏｒｄ ﬁne')
  t.match(phc, /^\$argon2id\$v=19\$m=64,t=1,p=1\$/)
  t.ok(await verify(phc, 'password fine'))
  t.equal(await passwords.verify(phc, 'password ﬁne', new PassThrough()), true)
  t.equal(await passwords.verify(phc, 'another', new PassThrough()), false)
  t.equal(await passwords.verify('no PHC string', 'no PHC string', new PassThrough()), false)

  const jobs = t.capture(HashQueue.prototype, 'run', HashQueue.prototype.run)
  t.equal(await passwords.verify(undefined, 'a password', new PassThrough()), false)
  t.equal(jobs().length, 1)
})
