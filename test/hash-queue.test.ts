import { EventEmitter, once } from 'node:events'
import { type AddressInfo, connect, type Socket } from 'node:net'
import { PassThrough, type Writable } from 'node:stream'
import { setTimeout as sleep, setImmediate as startedJobs } from 'node:timers/promises'
import t from 'tap'
import { ClientDisconnected, HashQueue, QueueFull } from '#src/passwords/hash-queue.js'
import { client, statusAndErrno } from '../testkit/client.js'
import { holdHashes } from '../testkit/hold-hashes.js'
import { type SignUpBody, startTestbed } from '../testkit/testbed.js'
import { retried, until } from '../testkit/until.js'

/*
 * The queue of hashes: its order, its admission (G6), and clients that disconnect while their hash waits.
 */

const { build, holdRedisWrites, redis, signUpBody, userRows } = await startTestbed(t)

const lines: string[] = []
const logStream = { write: (line: string) => lines.push(line) }
const errors = () => lines.filter((line) => JSON.parse(line).level > 30)

/** Admits nobody while a hash waits. */
const strictApp = await build(t, { HASH_MAX_WAIT_MS: '0', SMS_CODE_ATTEMPTS: '1000' }, { logStream })
const { passwords } = strictApp.mobileSignup
const { signUp, ...strictApi } = client(strictApp)
const logIn = ({ mobile, password }: SignUpBody) => strictApi.logIn({ mobile, password })

/** Admits every request, and listens. Its start needs a hash, so it is built before a test holds all hashes. */
const patientApp = await build(t, { HASH_MAX_WAIT_MS: '600000', METRICS_PORT: '0' }, { logStream })
await patientApp.listen({ port: 0, host: '127.0.0.1' })
const patientPasswords = patientApp.mobileSignup.passwords

/** Creates a queue. Its jobs run until the test ends them. `started` lists the jobs that have started, in order. */
function startQueue(threads: number, maxWaitMs = 0) {
  const queue = new HashQueue(threads, maxWaitMs)
  const started: string[] = []
  const barrier = new EventEmitter()
  const job = async (name: string) => {
    started.push(name)
    const [error] = await once(barrier, `end ${name}`)
    if (error) throw error
    return name
  }
  const run = (name: string, client?: Writable) => queue.run(() => job(name), client)
  return { queue, started, run, end: (name: string, error?: Error) => barrier.emit(`end ${name}`, error) }
}

t.test('G6: jobs start first come, first served, as many as there are threads', async (t) => {
  const { queue, started, run, end } = startQueue(2)
  const a = run('a')
  const b = run('b')
  const clients = [new PassThrough(), new PassThrough()] as const
  const disconnected = run('disconnected', clients[0])
  const c = run('c', clients[1])
  const d = run('d')
  clients[0].destroy()
  await t.rejects(disconnected, new ClientDisconnected())
  t.strictSame([started, queue.queueLength], [['a', 'b'], 2])
  end('b', new Error('no memory'))
  await t.rejects(b, /no memory/)
  await startedJobs()
  t.strictSame(started, ['a', 'b', 'c'])
  clients[1].destroy()
  end('c')
  t.equal(await c, 'c', 'a job that runs is finished')
  await t.rejects(run('e', clients[1]), new ClientDisconnected())
  const closed = queue.close().then(() => 'closed')
  await t.rejects(run('late'), new QueueFull(1))
  t.throws(() => queue.admit(), new QueueFull(1))
  t.strictSame(started, ['a', 'b', 'c', 'd'])
  end('a')
  await a
  t.equal(await Promise.race([closed, 'not yet']), 'not yet')
  end('d')
  t.strictSame(await Promise.all([d, closed]), ['d', 'closed'])
})

t.test('the expected wait counts admitted requests as if they had joined the queue', async (t) => {
  const { queue, run } = startQueue(2, 1_000)
  let averageMs = 0
  queue.onJob = (_waitMs, durationMs) => {
    averageMs = durationMs
  }
  await queue.run(() => sleep(25))
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

t.test('G6: a request whose hash would wait too long gets 503 4500 at once, and nothing is touched', async (t) => {
  const hashes = holdHashes(t)
  const [first, second, third] = [await signUpBody(), await signUpBody(), await signUpBody()]
  // Both are admitted, because nothing waits yet.
  const admitted = [signUp(first), signUp(second)]
  await hashes.untilJoined(2)
  const refused = await signUp(third)
  t.strictSame([refused.statusCode, refused.json()], [503, { errno: '4500', errmsg: '服务繁忙，请稍后重试' }])
  t.match(refused.headers['retry-after'], /^[1-9]\d*$/)
  t.strictSame(statusAndErrno(await logIn(third)), [503, '4500'])
  t.equal(passwords.queue.queueLength, 1, 'the answer does not wait for the queue')
  t.equal(await redis.get(`sms_code_${third.mobile}`), third.sms_code, 'the code stays')
  t.strictSame(await redis.keys(`login_failures:*${third.mobile}*`), [], 'the login is not counted')

  hashes.release()
  for (const reply of admitted) t.equal((await reply).statusCode, 201, 'a request that holds its code is hashed')
  t.equal((await retried(() => signUp(third))).statusCode, 201, 'later the refused request succeeds')
  t.strictSame(errors(), [])
})

t.test('G6: requests that wait for Redis count, and a login is admitted again when it joins the queue', async (t) => {
  const [user, body, third] = [await signUpBody(), await signUpBody(), await signUpBody()]
  t.equal((await signUp(user)).statusCode, 201)
  const writes = await holdRedisWrites(t)
  const admitted = [logIn(user), signUp(body)] as const
  await until('both are admitted', () => passwords.queue.expectedWaitMs > 0)
  for (const send of [signUp, logIn]) t.strictSame(statusAndErrno(await send(third)), [503, '4500'])
  t.equal(passwords.queue.queueLength, 0, 'the next is refused while the queue is still empty')
  const hashes = holdHashes(t)
  const queue = [1, 2, 3].map(() => passwords.hash('a password'))
  await writes.release()
  t.strictSame(statusAndErrno(await admitted[0]), [503, '4500'], 'the queue has grown')
  t.strictSame(await redis.keys(`login_failures:*${user.mobile}*`), [], 'and nothing is counted')
  hashes.release()
  t.equal((await admitted[1]).statusCode, 201, 'a sign-up that holds its code is hashed')
  await Promise.all(queue)
  t.equal(passwords.queue.expectedWaitMs, 0)
  t.equal((await signUp(third)).statusCode, 201)
})

t.test('G6: a request that is answered without a hash frees its place', async (t) => {
  const body = await signUpBody()
  for (let n = 0; n < 5; n++) t.strictSame(statusAndErrno(await signUp({ ...body, sms_code: 'wrong' })), [422, '4004'])
  t.equal((await signUp(body)).statusCode, 201)
})

/** Sends sign-ups on one connection, without waiting for answers. */
function pipeline(...bodies: SignUpBody[]): Socket {
  const { port } = patientApp.server.address() as AddressInfo
  const head = 'POST /api/v1.0/users HTTP/1.1\r\nHost: service\r\nContent-Type: application/json\r\nContent-Length: '
  const requests = bodies.map((body) => JSON.stringify(body)).map((json) => `${head}${json.length}\r\n\r\n${json}`)
  const socket = connect(port, '127.0.0.1')
  socket.write(requests.join(''))
  return socket
}

t.test('G6: so does one whose answer is never sent, because its connection dies before its turn', async (t) => {
  const hashes = holdHashes(t)
  const admits = t.capture(patientPasswords.queue, 'admit', patientPasswords.queue.admit)
  const wrong = { ...(await signUpBody()), sms_code: 'wrong' }
  const first = await signUpBody()
  const socket = pipeline(first, wrong, wrong, wrong)
  let admitted = 0
  await until('all are admitted, and only the first is hashed', () => {
    admitted += admits().length
    return admitted === 4 && patientPasswords.queue.expectedWaitMs === 0
  })
  socket.destroy()
  hashes.release()
  await until('the first is finished', async () => (await userRows(first.mobile)).length === 1)
})

t.test('after a disconnection a hash that runs is finished, by a shutdown, too; one that waits is not', async (t) => {
  const hashes = holdHashes(t)
  const [hashed, waiting] = [await signUpBody(), await signUpBody()]
  lines.length = 0
  const sockets = [pipeline(hashed)]
  await hashes.untilJoined(1)
  sockets.push(pipeline(waiting))
  await hashes.untilJoined(2)
  for (const socket of sockets) socket.destroy()
  await until('it is logged', () => lines.some((line) => line.includes('"outcome":"client_disconnected"')))
  t.strictSame([patientPasswords.queue.queueLength, errors()], [0, []])
  const metrics = await (await fetch(patientApp.metricsUrl ?? '')).text()
  t.match(metrics, /_count\{method="POST",route="\/api\/v1\.0\/users",outcome="client_disconnected"\} 1\n/)
  const closed = patientApp.close()
  hashes.release()
  await closed
  t.equal((await userRows(hashed.mobile)).length, 1)
  t.strictSame(await userRows(waiting.mobile), [])
  t.equal((await signUp(waiting)).statusCode, 201, 'its code still works')
})
