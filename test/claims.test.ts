import { createHmac, hkdfSync } from 'node:crypto'
import { EventEmitter, once } from 'node:events'
import { hash } from '@node-rs/argon2'
import t from 'tap'
import { StoreUnavailable } from '../dist/stores/store-unavailable.js'
import { client, statusAndErrno } from '../testkit/client.js'
import { leaseMsOf, recordKey, startTestbed } from '../testkit/testbed.js'
import { retried, until } from '../testkit/until.js'

/*
 * What a retry finds in the claim record. docs/guarantees.md explains the protocol.
 */

const testbed = await startTestbed(t)
const { build, buildHashingAfter, config, cookieOf, holdInserts, issueCode, newMobile, openProxy, postgres, redis } =
  testbed
const { ageClaim, readClaimRecord, signUpBody, stores, untilClaimed, userRows } = testbed

async function failToHash(): Promise<never> {
  throw new Error('no memory for a hash')
}

const instance = client(await build(t))
const { signUp } = instance
const failing = client(await buildHashingAfter(t, failToHash))

const fillRedis = () => redis.config('SET', 'maxmemory', '1')
const emptyRedis = () => redis.config('SET', 'maxmemory', '0')

t.test('G5: the same request again gets the same success, with a new session and Idempotent-Replayed', async (t) => {
  const other = client(await build(t))
  const body = await signUpBody()
  const first = await signUp(body)
  t.equal(first.headers['idempotent-replayed'], undefined)
  for (const { signUp, whoAmI } of [instance, other]) {
    const retry = await signUp(body)
    t.equal(retry.statusCode, 201)
    t.equal(retry.headers['idempotent-replayed'], 'true')
    t.strictSame(retry.json(), first.json())
    const cookie = cookieOf(retry)
    t.not(cookie, cookieOf(first))
    t.equal((await whoAmI(cookie)).json().data.user_id, first.json().data.user_id)
  }
  const ttlMs = await redis.pttl(recordKey(body.mobile))
  t.ok(ttlMs > 270_000 && ttlMs <= 300_000, 'the record expires after 300 s')
})

t.test('a replay with a wrong password gets 409, and the second one ends the replays', async (t) => {
  const body = await signUpBody()
  const withWrongPassword = { ...body, password: 'another password', password2: 'another password' }
  t.equal((await signUp(body)).statusCode, 201)
  t.strictSame(statusAndErrno(await signUp(withWrongPassword)), [409, '4003'])
  t.equal((await signUp(body)).headers['idempotent-replayed'], 'true', 'after the first wrong password')
  t.strictSame(statusAndErrno(await signUp(withWrongPassword)), [409, '4003'])
  t.strictSame(statusAndErrno(await signUp(body)), [422, '4004'], 'after the second, the code is a used code')
})

t.test('a replay whose password could not be verified counts as no wrong password', async (t) => {
  const app = await build(t)
  const { signUp } = client(app)
  const body = await signUpBody()
  t.equal((await signUp(body)).statusCode, 201)
  const { verify } = app.passwords
  app.passwords.verify = failToHash
  for (let n = 0; n < 2; n++) t.strictSame(statusAndErrno(await signUp(body)), [500, '4500'])
  app.passwords.verify = verify
  t.equal((await signUp(body)).headers['idempotent-replayed'], 'true')
})

t.test('of many simultaneous replays with wrong passwords, two are verified', async (t) => {
  const body = await signUpBody()
  await signUp(body)
  const replies = await Promise.all(
    Array.from({ length: 20 }, (_, index) => {
      const password = `wrong password ${index}`
      return retried(() => signUp({ ...body, password, password2: password }))
    })
  )
  t.equal(replies.filter(({ statusCode }) => statusCode === 409).length, 2)
  t.equal(replies.filter(({ statusCode }) => statusCode === 422).length, 18)
})

t.test('a replay gets 409 if the mobile has a new user', async (t) => {
  const body = await signUpBody()
  t.equal((await signUp(body)).statusCode, 201)
  await postgres.query('DELETE FROM users WHERE mobile = $1', [body.mobile])
  await postgres.query('INSERT INTO users (name, mobile, password_hash) VALUES ($1, $1, $2)', [
    body.mobile,
    await hash(body.password)
  ])
  t.strictSame(statusAndErrno(await signUp(body)), [409, '4003'])
})

t.test('the same request signs up again if Postgres has lost the row, with a new id, and once', async (t) => {
  const body = await signUpBody()
  const lost = await signUp(body)
  t.equal(lost.statusCode, 201)
  await postgres.query('DELETE FROM users WHERE mobile = $1', [body.mobile])

  const replies = await Promise.all(Array.from({ length: 8 }, () => retried(() => signUp(body))))
  const [row, ...others] = await userRows(body.mobile)
  t.strictSame(others, [])
  t.not(row.id, lost.json().data.user_id)
  for (const reply of replies)
    t.match([reply.statusCode, reply.json()], [201, { data: { user_id: row.id, session: true } }])
  t.equal((await instance.whoAmI(cookieOf(lost))).statusCode, 401, 'the session of the lost user has ended')
  const fresh = replies.filter(({ headers }) => headers['idempotent-replayed'] === undefined)
  t.equal(fresh.length, 1, 'one of them writes the row, the others are replays')
})

t.test('G4: after a failure while a lost row is written again, the same request succeeds', async (t) => {
  const proxy = await openProxy(t, 'DATABASE_URL')
  const { signUp } = client(await build(t, { DATABASE_URL: proxy.url }))
  const body = await signUpBody()
  await signUp(body)
  await postgres.query('DELETE FROM users WHERE mobile = $1', [body.mobile])
  proxy.strike('insert_user', { kind: 'reset' })
  t.strictSame(statusAndErrno(await signUp(body)), [503, '4001'])
  t.equal(await redis.exists(`sms_code_${body.mobile}`), 0, 'the code, which has been used, does not come back')
  t.equal((await readClaimRecord(body.mobile)).state, 'unknown')
  t.equal((await retried(() => signUp(body))).statusCode, 201)
})

t.test('a replay that finds no row on a former primary does not log its user out', async (t) => {
  const app = await build(t)
  const { signUp, logIn, whoAmI } = client(app)
  const body = await signUpBody()
  const first = await signUp(body)
  const { find, insert } = app.users
  app.users.find = async () => undefined
  // A former primary refuses writes.
  app.users.insert = () => Promise.reject(new StoreUnavailable('postgres'))
  t.strictSame(statusAndErrno(await signUp(body)), [503, '4001'])
  Object.assign(app.users, { find, insert })
  const retry = await signUp(body)
  t.match([retry.statusCode, retry.json()], [201, { data: { ...first.json().data, session: true } }])
  t.equal((await whoAmI(cookieOf(first))).statusCode, 200)
  t.equal((await logIn(body)).statusCode, 201)
})

t.test('G4: a reclaim whose user is deleted meanwhile gets 503, and the same request signs up', async (t) => {
  const proxy = await openProxy(t, 'DATABASE_URL')
  const { signUp: signUpSlowly } = client(await build(t, { DATABASE_URL: proxy.url }))
  const body = await signUpBody()
  const first = await signUp(body)
  const { mac, at } = await readClaimRecord(body.mobile)
  const unknown = { state: 'unknown', mac, at, ttl: 300_000, issue: {} }
  await redis.set(recordKey(body.mobile), JSON.stringify(unknown), 'PX', 300_000)
  const barrier = new EventEmitter()
  const held = proxy.strike('find_user', { kind: 'hold', until: once(barrier, 'release') })
  const reclaim = signUpSlowly(body)
  await held
  await postgres.query('DELETE FROM users WHERE mobile = $1', [body.mobile])
  barrier.emit('release')
  t.strictSame(statusAndErrno(await reclaim), [503, '4500'])
  const retry = await signUpSlowly(body)
  t.equal(retry.statusCode, 201)
  t.not(retry.json().data.user_id, first.json().data.user_id)
})

t.test('a replay whose row is lost leaves the claim of a newer code alone', async (t) => {
  const proxy = await openProxy(t, 'DATABASE_URL')
  const { signUp: signUpSlowly } = client(await build(t, { DATABASE_URL: proxy.url }))
  const body = await signUpBody()
  await signUp(body)
  await postgres.query('DELETE FROM users WHERE mobile = $1', [body.mobile])
  const barrier = new EventEmitter()
  const held = proxy.strike('find_user', { kind: 'hold', until: once(barrier, 'release') })
  const replay = signUpSlowly(body)
  await held

  const newer = { ...body, sms_code: await issueCode(body.mobile) }
  const inserts = await holdInserts(t)
  const signUpWithNewer = signUp(newer)
  await inserts.arrived(1)
  const record = await readClaimRecord(body.mobile)
  barrier.emit('release')
  t.strictSame(statusAndErrno(await replay), [503, '4500'])
  t.strictSame(await readClaimRecord(body.mobile), record)
  await inserts.release()
  t.equal((await signUpWithNewer).statusCode, 201)
})

t.test('a reset is not repeated if Postgres has lost the row: the mobile has no user', async (t) => {
  const registered = await signUpBody()
  await signUp(registered)
  const body = await signUpBody({ mobile: registered.mobile })
  const { resetPassword } = client(await build(t))
  t.equal((await resetPassword(body)).statusCode, 200)
  await postgres.query('DELETE FROM users WHERE mobile = $1', [body.mobile])
  t.strictSame(statusAndErrno(await resetPassword(body)), [422, '4004'])
})

t.test('the claim record has a keyed MAC of the code, and no trace of the code or the password', async (t) => {
  const otherSecret = await build(t, { SESSION_SECRET: 'another secret of at least 32 characters' })
  const body = await signUpBody()
  await signUp(body)
  const record = await readClaimRecord(body.mobile)
  t.strictSame(Object.keys(record).sort(), ['at', 'mac', 'state', 'user_id'])
  t.equal(Buffer.from(record.mac, 'base64url').length, 32)
  t.notMatch(JSON.stringify(record), body.sms_code)

  await postgres.query('DELETE FROM users WHERE mobile = $1', [body.mobile])
  await issueCode(body.mobile, body.sms_code)
  await client(otherSecret).signUp(body)
  t.not((await readClaimRecord(body.mobile)).mac, record.mac, 'another secret gives another MAC of the same code')

  const otherMobile = await signUpBody({ mobile: newMobile() })
  await issueCode(otherMobile.mobile, body.sms_code)
  await client(otherSecret).signUp({ ...otherMobile, sms_code: body.sms_code })
  t.not(
    (await readClaimRecord(otherMobile.mobile)).mac,
    (await readClaimRecord(body.mobile)).mac,
    'the same code of two mobiles has two MACs'
  )
})

t.test('G5: a retry is a replay also after a rotation of SESSION_SECRET', async (t) => {
  const oldSecret = 'an old secret of at least thirty-two characters'
  const before = await build(t, { SESSION_SECRET: oldSecret })
  const after = await build(t, {
    SESSION_SECRET: `a new secret of at least thirty-two characters,${oldSecret}`
  })
  const body = await signUpBody()
  t.equal((await client(before).signUp(body)).statusCode, 201)
  t.equal((await client(after).signUp(body)).headers['idempotent-replayed'], 'true')
})

t.test('G4: a claim of an instance of version 0.1.0 can be taken over', async (t) => {
  const body = await signUpBody()
  const secret = `${stores.environment.SESSION_SECRET}`
  const key = Buffer.from(hkdfSync('sha256', secret, '', 'mobile-signup: code of an attempt', 32))
  const mac = createHmac('sha256', key).update(`sign-up:${body.mobile}:${body.sms_code}`).digest('base64url')
  await redis.del(`sms_code_${body.mobile}`)
  await redis.set(recordKey(body.mobile), JSON.stringify({ state: 'pending', mac, at: '1', ttl: 100_000 }), 'EX', 300)
  t.equal((await signUp(body)).statusCode, 201)
})

t.test('while a code is claimed, the same code gets 503 4500 and a wrong one 422', async (t) => {
  const body = await signUpBody()
  const inserts = await holdInserts(t)
  const first = signUp(body)
  await inserts.arrived(1)
  const second = await signUp(body)
  t.strictSame([...statusAndErrno(second), second.headers['retry-after']], [503, '4500', '1'])
  t.strictSame(statusAndErrno(await signUp({ ...body, sms_code: 'wrong' })), [422, '4004'])
  t.strictSame(statusAndErrno(await signUp(body)), [503, '4500'])
  await inserts.release()
  t.equal((await first).statusCode, 201)
})

t.test(
  'G4: the code of an instance that died can be claimed again after the lease, by the same code only',
  async (t) => {
    const env = { HASH_MAX_WAIT_MS: '600000' }
    const proxy = await openProxy(t, 'REDIS_URL')
    const dying = client(await build(t, { ...env, REDIS_URL: proxy.url }))
    const other = client(await build(t, env))
    const body = await signUpBody()
    // The code is claimed, but the request does not know it.
    proxy.strike(recordKey(body.mobile), { kind: 'cut', bytes: 3 })
    t.strictSame(statusAndErrno(await dying.signUp(body)), [503, '4001'])
    t.equal(await redis.exists(`sms_code_${body.mobile}`), 0)
    t.equal((await readClaimRecord(body.mobile)).state, 'pending')

    t.strictSame(statusAndErrno(await other.signUp(body)), [503, '4500'])
    const remainingMs = 60_000
    await ageClaim(body.mobile, leaseMsOf(config(env)) - remainingMs)
    t.strictSame(statusAndErrno(await other.signUp(body)), [503, '4500'], 'until the end of the lease')
    await ageClaim(body.mobile, remainingMs)
    t.strictSame(statusAndErrno(await other.signUp({ ...body, sms_code: 'wrong' })), [422, '4004'])
    t.equal((await other.signUp(body)).statusCode, 201)
    t.equal((await userRows(body.mobile)).length, 1)
  }
)

t.test('a lease expires by the clock of Redis', async (t) => {
  const env = { HASH_MAX_WAIT_MS: '0', STORE_TIMEOUT_MS: '1000' }
  const proxy = await openProxy(t, 'REDIS_URL')
  const [dying, other] = [client(await build(t, { ...env, REDIS_URL: proxy.url })), client(await build(t, env))]
  const body = await signUpBody()
  proxy.strike(recordKey(body.mobile), { kind: 'cut', bytes: 3 })
  t.strictSame(statusAndErrno(await dying.signUp(body)), [503, '4001'])
  const first = await readClaimRecord(body.mobile)
  t.equal((await retried(() => other.signUp(body))).statusCode, 201)
  const second = await readClaimRecord(body.mobile)
  t.ok(Number(second.at) - Number(first.at) >= leaseMsOf(config(env)) * 1_000, 'the second claim is a lease younger')
})

t.test('after an INSERT of unknown outcome, the code is restored, and the hash of the row decides', async (t) => {
  const proxy = await openProxy(t, 'DATABASE_URL')
  const { signUp } = client(await build(t, { DATABASE_URL: proxy.url }))
  for (const isSamePassword of [true, false]) {
    const body = await signUpBody()
    await redis.pexpire(`sms_code_${body.mobile}`, 100_000)
    // The row is committed, but the request does not know it.
    proxy.strike('insert_user', { kind: 'cut', bytes: 3 })
    t.strictSame(statusAndErrno(await signUp(body)), [503, '4001'])
    t.equal(await redis.get(`sms_code_${body.mobile}`), body.sms_code)
    const ttlMs = await redis.pttl(`sms_code_${body.mobile}`)
    t.ok(ttlMs > 70_000 && ttlMs <= 100_000, 'the code has its remaining TTL')
    t.equal((await readClaimRecord(body.mobile)).state, 'unknown')

    await until('the row is committed', async () => (await userRows(body.mobile)).length === 1)
    if (!isSamePassword) {
      const passwordHash = await hash('another password')
      await postgres.query('UPDATE users SET password_hash = $2 WHERE mobile = $1', [body.mobile, passwordHash])
    }
    t.equal((await retried(() => signUp(body))).statusCode, isSamePassword ? 201 : 409)
    t.equal((await userRows(body.mobile)).length, 1)
  }
})

t.test(
  'G5: a retry keeps its claim while it compares its password with the row, so its instance may die',
  async (t) => {
    const proxy = await openProxy(t, 'DATABASE_URL')
    const { signUp } = client(await build(t, { DATABASE_URL: proxy.url }))
    const body = await signUpBody()
    proxy.strike('insert_user', { kind: 'cut', bytes: 3 })
    t.strictSame(statusAndErrno(await signUp(body)), [503, '4001'])
    await until('the row is committed', async () => (await userRows(body.mobile)).length === 1)

    const barrier = new EventEmitter()
    const held = proxy.strike('find_user', { kind: 'hold', until: once(barrier, 'release') })
    const retry = retried(() => signUp(body))
    await held
    t.equal((await readClaimRecord(body.mobile)).state, 'pending')
    barrier.emit('release')
    t.equal((await retry).statusCode, 201)
  }
)

t.test('G5: a request with another password does not end the retries of an earlier one', async (t) => {
  const proxy = await openProxy(t, 'DATABASE_URL')
  const { signUp } = client(await build(t, { DATABASE_URL: proxy.url }))
  const body = await signUpBody()
  const withOtherPassword = { ...body, password: 'another password', password2: 'another password' }
  proxy.strike('insert_user', { kind: 'cut', bytes: 3 })
  t.strictSame(statusAndErrno(await signUp(body)), [503, '4001'])
  await until('the row is committed', async () => (await userRows(body.mobile)).length === 1)

  t.strictSame(statusAndErrno(await retried(() => signUp(withOtherPassword))), [409, '4003'])
  const retry = await signUp(body)
  t.strictSame([retry.statusCode, retry.headers['idempotent-replayed']], [201, 'true'])
  t.strictSame(statusAndErrno(await signUp(withOtherPassword)), [409, '4003'], 'the second wrong password')
  t.strictSame(statusAndErrno(await signUp(body)), [422, '4004'])
})

t.test('G1: a success uses up a code that another request has put back, but no newer one', async (t) => {
  for (const isNewer of [false, true]) {
    const body = await signUpBody()
    const putBack = isNewer ? await issueCode(newMobile()) : body.sms_code
    const app = await buildHashingAfter(t, () => redis.set(`sms_code_${body.mobile}`, putBack))
    t.equal((await client(app).signUp(body)).statusCode, 201)
    t.equal(await redis.get(`sms_code_${body.mobile}`), isNewer ? putBack : null)
  }
})

t.test('a conflict discards the code: 409, and then 422', async (t) => {
  const body = await signUpBody()
  await signUp(body)
  const secondSignUp = await signUpBody({ mobile: body.mobile })
  t.strictSame(statusAndErrno(await signUp(secondSignUp)), [409, '4003'])
  t.strictSame(statusAndErrno(await signUp(secondSignUp)), [422, '4004'])
})

t.test(
  'a conflict stays a conflict if Redis does not answer the discard, also with the password of the user',
  async (t) => {
    const proxy = await openProxy(t, 'REDIS_URL')
    const { signUp } = client(await build(t, { REDIS_URL: proxy.url }))
    const body = await signUpBody()
    t.equal((await signUp(body)).statusCode, 201)
    const secondSignUp = { ...body, sms_code: await issueCode(body.mobile) }
    const struck = proxy.strike(recordKey(body.mobile), { kind: 'reset' }, 1)
    t.strictSame(statusAndErrno(await signUp(secondSignUp)), [409, '4003'])
    await struck
  }
)

t.test('a failure before the INSERT restores the code and deletes the claim record', async (t) => {
  const body = await signUpBody()
  t.strictSame(statusAndErrno(await failing.signUp(body)), [500, '4500'])
  t.equal(await redis.get(`sms_code_${body.mobile}`), body.sms_code)
  t.equal(await redis.exists(recordKey(body.mobile)), 0)
})

t.test('a restore does not overwrite a newer code, and does nothing while a newer code is claimed', async (t) => {
  const [replaced, overtaken] = [await signUpBody(), await signUpBody()]
  const inserts = await holdInserts(t)
  const first = [signUp(replaced), signUp(overtaken)]
  await inserts.arrived(2)
  const { rows } = await postgres.query(`SELECT pid FROM pg_locks WHERE relation = 'users'::regclass AND NOT granted`)

  const newerCode = await issueCode(replaced.mobile)
  const second = signUp({ ...overtaken, sms_code: await issueCode(overtaken.mobile) })
  await inserts.arrived(3)
  for (const { pid } of rows) await postgres.query('SELECT pg_cancel_backend($1::int)', [pid])
  for (const reply of first) t.strictSame(statusAndErrno(await reply), [503, '4001'])
  t.equal(await redis.get(`sms_code_${replaced.mobile}`), newerCode)
  t.equal(await redis.exists(`sms_code_${overtaken.mobile}`), 0, 'the older code is not restored')
  await inserts.release()
  t.equal((await second).statusCode, 201)
})

t.test('G5: a slow request whose claim was taken over gets the same success, not 409', async (t) => {
  const barrier = new EventEmitter()
  const slow = await buildHashingAfter(t, () => once(barrier, 'open'))
  const body = await signUpBody()
  const first = client(slow).signUp(body)
  await untilClaimed(body)
  await ageClaim(body.mobile, leaseMsOf(config()))
  t.equal((await signUp(body)).statusCode, 201)
  await until('the slow request is at the barrier', () => barrier.listenerCount('open') === 1)
  barrier.emit('open')
  const reply = await first
  t.equal(reply.statusCode, 201)
  t.equal((await userRows(body.mobile))[0].id, reply.json().data.user_id)
})

t.test('a code without a TTL is restored without one', async (t) => {
  const body = await signUpBody()
  await redis.persist(`sms_code_${body.mobile}`)
  t.equal((await failing.signUp(body)).statusCode, 500)
  t.equal(await redis.pttl(`sms_code_${body.mobile}`), -1)
  t.equal((await signUp(body)).statusCode, 201)
})

t.test('a full Redis refuses the claim and keeps the code', async (t) => {
  t.teardown(emptyRedis)
  const body = await signUpBody()
  await fillRedis()
  t.strictSame(statusAndErrno(await signUp(body)), [503, '4001'])
  t.equal(await redis.get(`sms_code_${body.mobile}`), body.sms_code)
  await emptyRedis()
  t.equal((await signUp(body)).statusCode, 201)
})

t.test('G4: if a full Redis refuses the restore, the code can be claimed again after the lease', async (t) => {
  const fillRedisAndFail = async () => {
    await fillRedis()
    await failToHash()
  }
  const filling = await buildHashingAfter(t, fillRedisAndFail)
  t.teardown(emptyRedis)
  const body = await signUpBody()
  t.strictSame(statusAndErrno(await client(filling).signUp(body)), [500, '4500'])
  t.equal((await readClaimRecord(body.mobile)).state, 'pending')
  await emptyRedis()
  t.strictSame(statusAndErrno(await signUp(body)), [503, '4500'])
  await ageClaim(body.mobile, leaseMsOf(config()))
  t.equal((await signUp(body)).statusCode, 201)
})

t.test('a Redis that has lost its scripts gets them again', async (t) => {
  t.equal((await signUp(await signUpBody())).statusCode, 201)
  await redis.script('FLUSH')
  t.equal((await signUp(await signUpBody())).statusCode, 201)
})
