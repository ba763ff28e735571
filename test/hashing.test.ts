import { readdirSync, readFileSync } from 'node:fs'
import { type AddressInfo, connect, type Socket } from 'node:net'
import { getPriority } from 'node:os'
import { PassThrough } from 'node:stream'
import { verify } from '@node-rs/argon2'
import type { FastifyInstance } from 'fastify'
import t from 'tap'
import { buildApp } from '../src/app.js'
import { ClientGone, HashPool } from '../src/passwords/hash-pool.js'
import { build, issueCode, post, redis, signUpBody, testConfig, until, userRow } from './helper.js'

/** A hash that takes long enough to be waited for, and hashes that take next to nothing. */
const slow = { memoryCost: 65_536, timeCost: 3, parallelism: 1 }

/** Sends a sign-up on a connection of its own and waits until its code has been taken. */
async function sendAndTake(app: FastifyInstance, body: Awaited<ReturnType<typeof signUpBody>>): Promise<Socket> {
  const { port } = app.server.address() as AddressInfo
  const socket = connect(port, '127.0.0.1')
  const json = JSON.stringify(body)
  socket.write(
    `POST /api/v1.0/users HTTP/1.1\r\nHost: service\r\nContent-Type: application/json\r\nContent-Length: ${json.length}\r\n\r\n${json}`
  )
  await until(async () => (await redis.exists(`sms_code_${body.mobile}`)) === 0)
  return socket
}

t.test('the pool hashes and verifies, and a hash that cannot be made is an error of its own', async (t) => {
  const pool = new HashPool(2, { memoryCost: 64, timeCost: 1, parallelism: 1 })
  t.teardown(() => pool.close())
  const phc = await pool.hash('a password')
  t.match(phc, /^\$argon2id\$v=19\$m=64,t=1,p=1\$/)
  t.ok(await verify(phc, 'a password'))
  t.equal(await pool.verify(phc, 'a password'), true)
  t.equal(await pool.verify(phc, 'another'), false)
  await t.rejects(pool.verify('no PHC string', 'a password'))
  t.equal(await pool.verify(phc, 'a password'), true, 'and the pool goes on')
})

t.test('first come, first served: hashes and verifications in one queue', async (t) => {
  const pool = new HashPool(1, { memoryCost: 64, timeCost: 1, parallelism: 1 })
  t.teardown(() => pool.close())
  const phc = await pool.hash('a password')
  const finished: number[] = []
  await Promise.all(
    Array.from({ length: 40 }, async (_, n) => {
      await (n % 3 === 0 ? pool.verify(phc, 'a password') : pool.hash('a password'))
      finished.push(n)
    })
  )
  t.strictSame(finished, [...finished.keys()])
})

t.test(
  'the threads of the pool have a lower priority than the event loop',
  { skip: process.platform !== 'linux' },
  async (t) => {
    // nice is the 19th field of stat, and the name before it may hold spaces (proc(5)).
    const niceness = () =>
      readdirSync('/proc/self/task').map((tid) =>
        Number(readFileSync(`/proc/self/task/${tid}/stat`, 'utf8').split(') ')[1]?.split(' ')[16])
      )
    const pool = new HashPool(3, { memoryCost: 64, timeCost: 1, parallelism: 1 })
    t.teardown(() => pool.close())
    await pool.ready()
    t.equal(niceness().filter((nice) => nice === getPriority() + 10).length, 3)
  }
)

t.test('shutdown finishes the queue', async (t) => {
  const pool = new HashPool(1, { memoryCost: 64, timeCost: 1, parallelism: 1 })
  const jobs = Array.from({ length: 20 }, () => pool.hash('a password'))
  await pool.close()
  t.equal((await Promise.all(jobs)).length, 20)
})

t.test('a pool whose settings no hash can be made with is not ready', async (t) => {
  const pool = new HashPool(1, { memoryCost: 1, timeCost: 1, parallelism: 1 })
  t.teardown(() => pool.close())
  await t.rejects(pool.ready(), /[Mm]emory/)
})

t.test('a client that goes while its job waits takes it out of the queue, but not one that has begun', async (t) => {
  const pool = new HashPool(1, slow)
  t.teardown(() => pool.close())
  await pool.ready()
  const [first, second] = [new PassThrough(), new PassThrough()]
  const begun = pool.hash('begun', first)
  const waiting = pool.hash('waiting', second)
  t.ok(pool.expectedWaitMs > 0)
  second.destroy()
  await t.rejects(waiting, new ClientGone())
  t.equal(pool.expectedWaitMs, 0)
  first.destroy()
  t.match(await begun, /^\$argon2id/)
  await t.rejects(pool.hash('late', second), new ClientGone(), 'nor does it enter when it has gone before')
})

t.test(
  'admission: over HASH_MAX_WAIT_MS 503 4500 at once, an honest Retry-After, and the code stays (G6)',
  async (t) => {
    const app = await build(t, { HASH_MEMORY_KIB: '65536', HASH_PASSES: '3', HASH_THREADS: '1', HASH_MAX_WAIT_MS: '0' })
    const bodies = await Promise.all(Array.from({ length: 3 }, () => signUpBody()))
    // One is at work, one waits: from now on there is a wait.
    const admitted = bodies.slice(0, 2).map((body) => post(app, body))
    const codes = bodies.slice(0, 2).map(({ mobile }) => `sms_code_${mobile}`)
    await until(async () => (await redis.exists(...codes)) === 0)
    await new Promise(setImmediate)
    const [, , third] = bodies
    const refused = await post(app, third ?? {})
    t.strictSame([refused.statusCode, refused.json()], [503, { errno: '4500', errmsg: '服务繁忙，请稍后重试' }])
    t.match(refused.headers['retry-after'], /^[1-9]\d*$/)
    t.equal(await redis.get(`sms_code_${third?.mobile}`), third?.sms_code)

    t.strictSame(
      (await Promise.all(admitted)).map(({ statusCode }) => statusCode),
      [201, 201],
      'what took its code is hashed'
    )
    t.equal((await post(app, third ?? {})).statusCode, 201, 'and later the refused one signs up')
  }
)

t.test('admission is a look, not a hold: a flood of wrong codes pushes no right one out', async (t) => {
  const app = await build(t, { HASH_THREADS: '1', HASH_MAX_WAIT_MS: '0' })
  const right = await signUpBody()
  const wrong = await signUpBody()
  const flood = Array.from({ length: 2_000 }, () => post(app, { ...wrong, sms_code: 'wrong' }))
  const reply = await post(app, right)
  t.equal(reply.statusCode, 201)
  t.ok((await Promise.all(flood)).every(({ statusCode }) => statusCode === 422))
})

t.test(
  'a client that goes while its sign-up waits is not hashed; its code goes back with its remaining life',
  async (t) => {
    const app = await build(t, { HASH_MEMORY_KIB: '65536', HASH_PASSES: '9', HASH_THREADS: '1' })
    await app.listen({ port: 0 })
    const [working, gone, newer] = [await signUpBody(), await signUpBody(), await signUpBody()]
    await redis.pexpire(`sms_code_${gone.mobile}`, 100_000)
    const first = post(app, working)
    await until(async () => (await redis.exists(`sms_code_${working.mobile}`)) === 0)

    const sockets = [await sendAndTake(app, gone), await sendAndTake(app, newer)]
    const newerCode = await issueCode(newer.mobile)
    for (const socket of sockets) socket.destroy()
    await until(async () => (await redis.exists(`sms_code_${gone.mobile}`)) === 1)
    t.equal(await redis.get(`sms_code_${gone.mobile}`), gone.sms_code)
    const ttl = await redis.pttl(`sms_code_${gone.mobile}`)
    t.ok(ttl > 0 && ttl <= 100_000, 'no more than it had')

    t.equal((await first).statusCode, 201)
    t.strictSame([await userRow(gone.mobile), await userRow(newer.mobile)], [[], []], 'nothing was written')
    t.equal(await redis.get(`sms_code_${newer.mobile}`), newerCode, 'a newer code is not overwritten')
    t.equal((await post(app, gone)).statusCode, 201, 'the code still works')
  }
)

t.test('shutdown waits for the sign-ups of clients that have gone: their codes go back', async (t) => {
  const app = await buildApp(testConfig({ HASH_MEMORY_KIB: '65536', HASH_PASSES: '9', HASH_THREADS: '1' }), {
    write: () => undefined
  })
  await app.listen({ port: 0 })
  const [working, gone] = [await signUpBody(), await signUpBody()]
  const first = await sendAndTake(app, working)
  const second = await sendAndTake(app, gone)
  first.destroy()
  second.destroy()
  await app.close()
  t.equal(await redis.get(`sms_code_${gone.mobile}`), gone.sms_code)
  t.equal((await userRow(working.mobile)).length, 1, 'what had begun is finished')
})
