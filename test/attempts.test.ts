import { EventEmitter, once } from 'node:events'
import { setTimeout as sleep } from 'node:timers/promises'
import { hash, verify } from '@node-rs/argon2'
import Fastify, { type FastifyInstance } from 'fastify'
import fp from 'fastify-plugin'
import t, { type Test } from 'tap'
import { codes } from '../src/codes/codes.js'
import type { Environment } from '../src/config/config.js'
import { envelope } from '../src/http/envelope.js'
import { work } from '../src/http/work.js'
import { sessions } from '../src/sessions/sessions.js'
import { postgres as postgresPlugin } from '../src/stores/postgres.js'
import { redis as redisPlugin } from '../src/stores/redis.js'
import { userRoutes } from '../src/users/redeem-code.js'
import { users } from '../src/users/users.js'
import { FaultProxy } from './fault-proxy.js'
import {
  brief,
  build,
  cookieOf,
  holdInserts,
  issueCode,
  markerKey,
  newMobile,
  post,
  postgres,
  redis,
  signUpBody,
  stores,
  testConfig,
  until,
  userRow
} from './helper.js'

/*
 * The attempt marker: what a retry finds, and what a guess does. docs/guarantees.md has the protocol.
 */

const markerOf = async (mobile: string) => JSON.parse((await redis.get(markerKey(mobile))) ?? 'null')

/** The service with something before each hash: a barrier, or a failure. */
async function buildWithHashesAfter(t: Test, before: () => Promise<void>, env: Environment = {}) {
  const config = testConfig(env)
  const delayed = fp(
    async (fastify) => {
      fastify.decorate('passwords', {
        retryAfterSeconds: () => undefined,
        verify: (phc, password) => verify(phc ?? '', password),
        queueLength: 0,
        expectedWaitMs: 0,
        isOutdated: () => false,
        async hash(password) {
          await before()
          return hash(password)
        }
      } satisfies FastifyInstance['passwords'])
    },
    { name: 'passwords' }
  )
  const app = Fastify()
  t.after(() => app.close())
  await app.register(
    async (scope) => {
      await scope.register(envelope, config)
      await scope.register(postgresPlugin, config)
      await scope.register(redisPlugin, config)
      await scope.register(codes, config)
      await scope.register(delayed)
      await scope.register(users)
      await scope.register(sessions, config)
      await scope.register(work)
      await scope.register(userRoutes, config)
    },
    { prefix: config.apiPrefix }
  )
  return app
}

/** A hash that cannot be made, at first. */
function failure() {
  const hashes = {
    work: false,
    fail: async () => {
      if (!hashes.work) throw new Error('no memory for a hash')
    }
  }
  return hashes
}

/** Settings with a short lease. */
const leaseMs = 500 + 3 * 100
const shortLease = { HASH_MAX_WAIT_MS: '500', STORE_TIMEOUT_MS: '100' }

t.test('G5: the same request again is the same success: user_id, a new session, Idempotent-Replayed', async (t) => {
  const [here, there] = [await build(t), await build(t)]
  const body = await signUpBody()
  const first = await post(here, body)
  t.equal(first.headers['idempotent-replayed'], undefined)
  for (const app of [here, there]) {
    const again = await post(app, body)
    t.equal(again.statusCode, 201)
    t.equal(again.headers['idempotent-replayed'], 'true')
    t.strictSame(again.json(), first.json())
    const cookie = cookieOf(again)
    t.not(cookie, cookieOf(first))
    const session = await app.inject({ url: '/api/v1.0/session', headers: { cookie } })
    t.equal(session.json().data.user_id, first.json().data.user_id)
  }
  const lifeMs = await redis.pttl(markerKey(body.mobile))
  t.ok(lifeMs > 290_000 && lifeMs <= 300_000, 'for 300 s')
})

t.test('a replay with another password is 409; the second wrong one ends it', async (t) => {
  const app = await build(t)
  const body = await signUpBody()
  const wrong = { ...body, password: 'another password', password2: 'another password' }
  t.equal((await post(app, body)).statusCode, 201)
  t.strictSame(brief(await post(app, wrong)), [409, '4003'])
  t.equal((await post(app, body)).headers['idempotent-replayed'], 'true', 'after the first it goes on')
  t.strictSame(brief(await post(app, wrong)), [409, '4003'])
  t.strictSame(brief(await post(app, body)), [422, '4004'], 'after the second the code is as used as any')
})

t.test('of many simultaneous replays with wrong passwords two are looked at', async (t) => {
  const app = await build(t)
  const body = await signUpBody()
  await post(app, body)
  const guesses = Array.from({ length: 20 }, async (_, n) => {
    const password = `a guess, number ${n}`
    let reply = await post(app, { ...body, password, password2: password })
    while (reply.statusCode === 503) reply = await post(app, { ...body, password, password2: password })
    return reply.statusCode
  })
  const answers = await Promise.all(guesses)
  t.equal(answers.filter((status) => status === 409).length, 2)
  t.equal(answers.filter((status) => status === 422).length, 18)
})

t.test('a replay whose user has been deleted since, or renewed, is not answered with success', async (t) => {
  const app = await build(t)
  const body = await signUpBody()
  t.equal((await post(app, body)).statusCode, 201)
  await postgres.query('DELETE FROM users WHERE mobile = $1', [body.mobile])
  t.equal((await post(app, body)).statusCode, 409)
})

t.test(
  'no secret stands in Redis beside the code: the marker has a keyed MAC, and no trace of the password',
  async (t) => {
    const [app, other] = [
      await build(t),
      await build(t, { SESSION_SECRET: 'another secret of at least 32 characters' })
    ]
    const [here, there] = [await signUpBody({ mobile: newMobile() }), await signUpBody()]
    await post(app, here)
    const marker = await markerOf(here.mobile)
    t.strictSame(Object.keys(marker).sort(), ['at', 'mac', 'state', 'user_id'])
    t.equal(Buffer.from(marker.mac, 'base64url').length, 32)
    t.notMatch(JSON.stringify(marker), here.sms_code)
    await issueCode(there.mobile, here.sms_code)
    await post(other, { ...there, sms_code: here.sms_code })
    t.not((await markerOf(there.mobile)).mac, marker.mac)
  }
)

t.test('a retry after a rotation of SESSION_SECRET is safe: all secrets verify', async (t) => {
  const old = 'an old secret of at least thirty-two characters'
  const [before, after] = [
    await build(t, { SESSION_SECRET: old }),
    await build(t, { SESSION_SECRET: `a new secret of at least thirty-two characters,${old}` })
  ]
  const body = await signUpBody()
  t.equal((await post(before, body)).statusCode, 201)
  t.equal((await post(after, body)).headers['idempotent-replayed'], 'true')
})

t.test('a code in hand is 503 4500 for whoever presents it again, and 422 for a wrong one', async (t) => {
  const app = await build(t, { SMS_CODE_ATTEMPTS: '2', STORE_TIMEOUT_MS: '30000' })
  const body = await signUpBody()
  const inserts = await holdInserts()
  const first = post(app, body)
  await inserts.arrived(1)
  const again = await post(app, body)
  t.strictSame([...brief(again), again.headers['retry-after']], [503, '4500', '1'])
  t.strictSame(brief(await post(app, { ...body, sms_code: 'wrong' })), [422, '4004'])
  t.strictSame(brief(await post(app, body)), [503, '4500'], 'one guess of two is not the last')
  await inserts.release()
  t.equal((await first).statusCode, 201)
})

t.test(
  'a wrong guess never makes a right one fail beside it, and ends the marker that could be guessed at',
  async (t) => {
    const app = await build(t, { STORE_TIMEOUT_MS: '30000' })
    const body = await signUpBody()
    const inserts = await holdInserts()
    const first = post(app, body)
    await inserts.arrived(1)
    t.strictSame(brief(await post(app, { ...body, sms_code: 'wrong' })), [422, '4004'])
    t.equal(await redis.exists(markerKey(body.mobile)), 0)
    await inserts.release()
    t.equal((await first).statusCode, 201)
    t.equal((await post(app, body)).headers['idempotent-replayed'], 'true', 'and its retry is safe')
  }
)

t.test('an attempt whose owner died is taken over when its lease has ended, by the same code alone', async (t) => {
  const proxy = await FaultProxy.open(stores.redisUrl)
  t.teardown(() => proxy.close())
  const app = await build(t, { ...shortLease, REDIS_URL: proxy.url })
  const body = await signUpBody()
  // The code is taken and nobody knows: as after a death.
  proxy.strike(markerKey(body.mobile), { kind: 'drop reply' })
  t.strictSame(brief(await post(app, body)), [503, '4001'])
  t.equal(await redis.exists(`sms_code_${body.mobile}`), 0)
  t.equal((await markerOf(body.mobile)).state, 'pending')
  const answers = new Set<string>()
  const startedAt = Date.now()
  let reply = await post(app, body)
  for (; reply.statusCode === 503; reply = await post(app, body)) {
    answers.add(reply.json().errno)
    await sleep(20)
  }
  t.ok(answers.has('4500'), 'within the lease it is in progress')
  t.ok(Date.now() - startedAt < leaseMs + 1_000, 'and not for longer')
  t.equal(reply.statusCode, 201)
  t.equal((await userRow(body.mobile)).length, 1)
})

t.test('an INSERT of unknown outcome: the code is back, and the row’s hash decides about the retry', async (t) => {
  const app = await build(t, { STORE_TIMEOUT_MS: '300' })
  for (const samePassword of [true, false]) {
    const body = await signUpBody()
    await redis.pexpire(`sms_code_${body.mobile}`, 100_000)
    const inserts = await holdInserts()
    t.strictSame(brief(await post(app, body)), [503, '4001'])
    t.equal(await redis.get(`sms_code_${body.mobile}`), body.sms_code)
    const lifeMs = await redis.pttl(`sms_code_${body.mobile}`)
    t.ok(lifeMs > 90_000 && lifeMs <= 100_000, 'with its remaining life')
    t.equal((await markerOf(body.mobile)).state, 'unknown')
    await inserts.release()
    // The row comes after all.
    await postgres.query('INSERT INTO users (name, mobile, password_hash) VALUES ($1, $1, $2)', [
      body.mobile,
      await hash(samePassword ? body.password : 'another password')
    ])
    t.equal((await post(app, body)).statusCode, samePassword ? 201 : 409)
  }
})

t.test('a conflict uses the code up: 409, and then 422', async (t) => {
  const app = await build(t)
  const body = await signUpBody()
  await post(app, body)
  const second = await signUpBody({ mobile: body.mobile })
  t.strictSame(brief(await post(app, second)), [409, '4003'])
  t.strictSame(brief(await post(app, second)), [422, '4004'])
})

t.test('a fault before the INSERT: the code is back, and nothing else', async (t) => {
  const app = await buildWithHashesAfter(t, failure().fail)
  const body = await signUpBody()
  t.strictSame(brief(await post(app, body)), [500, '4500'])
  t.equal(await redis.get(`sms_code_${body.mobile}`), body.sms_code)
  t.equal(await redis.exists(markerKey(body.mobile)), 0)
})

t.test('a put-back never overwrites a newer code, nor stands beside one that is in hand', async (t) => {
  const [app, patient] = [await build(t, { STORE_TIMEOUT_MS: '1000' }), await build(t, { STORE_TIMEOUT_MS: '30000' })]
  const [replaced, overtaken] = [await signUpBody(), await signUpBody()]
  const inserts = await holdInserts()
  const first = [post(app, replaced), post(app, overtaken)]
  await until(async () => (await redis.exists(`sms_code_${replaced.mobile}`, `sms_code_${overtaken.mobile}`)) === 0)
  const newer = await issueCode(replaced.mobile)
  const second = post(patient, { ...overtaken, sms_code: await issueCode(overtaken.mobile) })
  for (const reply of first) t.strictSame(brief(await reply), [503, '4001'])
  t.equal(await redis.get(`sms_code_${replaced.mobile}`), newer)
  t.equal(await redis.get(`sms_code_${overtaken.mobile}`), null, 'the place of the newer one is free')
  await inserts.release()
  t.equal((await second).statusCode, 201)
})

t.test('a slow owner finds that its code was taken over and done: the same success, not 409', async (t) => {
  const barrier = new EventEmitter()
  const [slow, quick] = [
    await buildWithHashesAfter(t, async () => void (await once(barrier, 'go on'))),
    await build(t, shortLease)
  ]
  const body = await signUpBody()
  const first = post(slow, body)
  await until(async () => (await redis.exists(`sms_code_${body.mobile}`)) === 0)
  await until(async () => (await post(quick, body)).statusCode === 201)
  barrier.emit('go on')
  const reply = await first
  t.equal(reply.statusCode, 201)
  t.equal((await userRow(body.mobile))[0].id, reply.json().data.user_id)
})

t.test('SMS_CODE_ATTEMPTS wrong guesses use a code up; one fewer do not, and a new code starts anew', async (t) => {
  const app = await build(t, { SMS_CODE_ATTEMPTS: '3' })
  const guess = async (body: object) =>
    t.strictSame(brief(await post(app, { ...body, sms_code: 'wrong' })), [422, '4004'])
  const lucky = await signUpBody()
  await redis.pexpire(`sms_code_${lucky.mobile}`, 100_000)
  await guess(lucky)
  await guess(lucky)
  const lifeMs = await redis.pttl(`sms_code_${lucky.mobile}`)
  t.ok(lifeMs > 90_000 && lifeMs <= 100_000, 'it stays with its life')
  t.ok((await redis.pttl(markerKey(lucky.mobile))) <= 100_000, 'and so does the count')
  t.equal((await post(app, lucky)).statusCode, 201)

  const body = await signUpBody()
  for (const _ of [1, 2]) await guess(body)
  const failing = await buildWithHashesAfter(t, failure().fail, { SMS_CODE_ATTEMPTS: '3' })
  const spent = await signUpBody()
  for (const _ of [1, 2]) await guess(spent)
  t.strictSame(brief(await post(failing, spent)), [500, '4500'])
  await guess(spent)
  t.strictSame(brief(await post(app, spent)), [422, '4004'], 'a put-back gives no new guesses')

  await issueCode(body.mobile, body.sms_code.toUpperCase())
  for (const _ of [1, 2, 3]) await guess(body)
  t.strictSame(brief(await post(app, { ...body, sms_code: body.sms_code.toUpperCase() })), [422, '4004'])
})

t.test('a code without an end is taken and put back as such', async (t) => {
  const hashes = failure()
  const app = await buildWithHashesAfter(t, hashes.fail)
  const body = await signUpBody()
  await redis.persist(`sms_code_${body.mobile}`)
  await post(app, body)
  t.equal(await redis.pttl(`sms_code_${body.mobile}`), -1)
  hashes.work = true
  t.equal((await post(app, body)).statusCode, 201)
})

t.test('a Redis that is full takes no code; one that fills up keeps the marker, which its lease ends', async (t) => {
  const fill = () => redis.config('SET', 'maxmemory', '1')
  const empty = () => redis.config('SET', 'maxmemory', '0')
  t.teardown(empty)
  const app = await build(t)
  const hashes = failure()
  const failing = await buildWithHashesAfter(
    t,
    () => (hashes.work ? hashes.fail() : fill().then(hashes.fail)),
    shortLease
  )
  const [before, between] = [await signUpBody(), await signUpBody()]

  await fill()
  t.strictSame(brief(await post(app, before)), [503, '4001'])
  t.equal(await redis.get(`sms_code_${before.mobile}`), before.sms_code)
  await empty()
  t.equal((await post(app, before)).statusCode, 201)

  t.strictSame(brief(await post(failing, between)), [500, '4500'])
  t.equal((await markerOf(between.mobile)).state, 'pending')
  await empty()
  hashes.work = true
  await until(async () => (await post(failing, between)).statusCode === 201)
})

t.test('a Redis that has forgotten its scripts is given them again', async (t) => {
  const app = await build(t)
  t.equal((await post(app, await signUpBody())).statusCode, 201)
  await redis.script('FLUSH')
  t.equal((await post(app, await signUpBody())).statusCode, 201)
})
