import { EventEmitter, once } from 'node:events'
import { hash } from '@node-rs/argon2'
import t from 'tap'
import { StoreUnavailable } from '#src/stores/store-unavailable.js'
import { client, statusAndErrno } from '../testkit/client.js'
import { claimKey, leaseMsOf, startTestbed } from '../testkit/testbed.js'
import { retried, until } from '../testkit/until.js'

/*
 * What a repeat finds in the claim of its code. docs/guarantees.md explains the protocol.
 */

const testbed = await startTestbed(t)
const { build, buildHashingAfter, config, cookieOf, holdInserts, issueCode, openProxy, postgres, redis } = testbed
const { ageClaim, readClaim, signUpBody, untilHeld, userRows } = testbed

async function failToHash(): Promise<never> {
  throw new Error('no memory for a hash')
}

const instance = client(await build(t))
const { signUp } = instance
const failing = client(await buildHashingAfter(t, failToHash))

const fillRedis = () => redis.config('SET', 'maxmemory', '1')
const emptyRedis = () => redis.config('SET', 'maxmemory', '0')
const deleteUser = (mobile: string) => postgres.query('DELETE FROM users WHERE mobile = $1', [mobile])
const withOtherPassword = <T extends object>(body: T) => ({
  ...body,
  password: 'another password',
  password2: 'another password'
})

t.test('G5: the same request again gets the same success, with a new session and Idempotent-Replayed', async (t) => {
  // Without a common secret: whoever holds a code is known by the code itself.
  const other = client(await build(t, { SESSION_SECRET: 'another secret of at least 32 characters' }))
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
})

t.test('a repeat with a wrong password gets 409, and the second one ends the repeats', async (t) => {
  const body = await signUpBody()
  t.equal((await signUp(body)).statusCode, 201)
  t.strictSame(statusAndErrno(await signUp(withOtherPassword(body))), [409, '4003'])
  t.equal((await signUp(body)).headers['idempotent-replayed'], 'true', 'after the first wrong password')
  t.strictSame(statusAndErrno(await signUp(withOtherPassword(body))), [409, '4003'])
  t.strictSame(statusAndErrno(await signUp(body)), [422, '4004'], 'after the second, the code is a used code')
})

t.test('a repeat whose password could not be verified counts as no wrong password', async (t) => {
  const app = await build(t)
  const { signUp } = client(app)
  const body = await signUpBody()
  t.equal((await signUp(body)).statusCode, 201)
  const { verify } = app.mobileSignup.passwords
  app.mobileSignup.passwords.verify = failToHash
  for (let n = 0; n < 2; n++) t.strictSame(statusAndErrno(await signUp(body)), [500, '4500'])
  app.mobileSignup.passwords.verify = verify
  t.equal((await signUp(body)).headers['idempotent-replayed'], 'true')
})

t.test('of many simultaneous repeats with wrong passwords, two are verified', async (t) => {
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

t.test(
  'G5: the repeat of a conflict is a conflict again, whatever its password, and does not touch Postgres',
  async (t) => {
    const body = await signUpBody()
    await signUp(body)
    const second = { ...(await signUpBody({ mobile: body.mobile })) }
    t.strictSame(statusAndErrno(await signUp(second)), [409, '4003'])
    await deleteUser(body.mobile)
    t.strictSame(statusAndErrno(await signUp(second)), [409, '4003'])
    t.strictSame(statusAndErrno(await signUp({ ...body, sms_code: second.sms_code })), [409, '4003'])
    t.strictSame(await userRows(body.mobile), [])

    const reset = await signUpBody()
    for (let n = 0; n < 2; n++)
      t.strictSame(statusAndErrno(await instance.resetPassword(reset)), [422, '4004'], 'a reset')
    t.equal((await readClaim(reset.mobile)).used_by, '')
  }
)

t.test('the same request signs up again if Postgres has lost the row, with a new id, and once', async (t) => {
  const body = await signUpBody()
  const lost = await signUp(body)
  t.equal(lost.statusCode, 201)
  await deleteUser(body.mobile)

  const replies = await Promise.all(Array.from({ length: 8 }, () => retried(() => signUp(body))))
  const [row, ...others] = await userRows(body.mobile)
  t.strictSame(others, [])
  t.not(row.id, lost.json().data.user_id)
  for (const reply of replies)
    t.match([reply.statusCode, reply.json()], [201, { data: { user_id: row.id, session: true } }])
  t.equal((await instance.whoAmI(cookieOf(lost))).statusCode, 401, 'the session of the lost user has ended')
  const fresh = replies.filter(({ headers }) => headers['idempotent-replayed'] === undefined)
  t.equal(fresh.length, 1, 'one of them writes the row, the others repeat it')
})

t.test('G4: after a failure while a lost row is written again, the same request succeeds', async (t) => {
  const proxy = await openProxy(t, 'DATABASE_URL')
  const { signUp } = client(await build(t, { DATABASE_URL: proxy.url }))
  const body = await signUpBody()
  await signUp(body)
  await deleteUser(body.mobile)
  proxy.strike('insert_user', { kind: 'reset' })
  t.strictSame(statusAndErrno(await signUp(body)), [503, '4001'])
  t.equal((await readClaim(body.mobile)).may_have_written, true)
  t.equal((await retried(() => signUp(body))).statusCode, 201)
})

t.test('a repeat that finds no row on a former primary does not log its user out', async (t) => {
  const app = await build(t)
  const { signUp, logIn, whoAmI } = client(app)
  const body = await signUpBody()
  const first = await signUp(body)
  const { find, insert } = app.mobileSignup.users
  app.mobileSignup.users.find = async () => undefined
  // A former primary refuses writes.
  app.mobileSignup.users.insert = () => Promise.reject(new StoreUnavailable('postgres'))
  t.strictSame(statusAndErrno(await signUp(body)), [503, '4001'])
  Object.assign(app.mobileSignup.users, { find, insert })
  const retry = await signUp(body)
  t.match([retry.statusCode, retry.json()], [201, { data: { ...first.json().data, session: true } }])
  t.equal((await whoAmI(cookieOf(first))).statusCode, 200)
  t.equal((await logIn(body)).statusCode, 201)
})

t.test('G4: a repeat whose user is deleted before its INSERT conflicts signs up', async (t) => {
  const app = await build(t)
  const { signUp } = client(app)
  const body = await signUpBody()
  const { find, insert } = app.mobileSignup.users
  app.mobileSignup.users.insert = async (mobile, passwordHash) => {
    await insert(mobile, passwordHash)
    throw new StoreUnavailable('postgres')
  }
  t.strictSame(statusAndErrno(await signUp(body)), [503, '4001'])
  // The repeat looks on a replica without the row. Its INSERT conflicts, and then the user is deleted.
  app.mobileSignup.users.find = async () => undefined
  app.mobileSignup.users.insert = async () => undefined
  t.strictSame(statusAndErrno(await signUp(body)), [503, '4500'])
  await deleteUser(body.mobile)
  Object.assign(app.mobileSignup.users, { find, insert })
  t.equal((await signUp(body)).statusCode, 201)
})

t.test('a repeat that has lost its code to a newer one leaves the claim of that alone', async (t) => {
  const proxy = await openProxy(t, 'DATABASE_URL')
  const { signUp: signUpSlowly } = client(await build(t, { DATABASE_URL: proxy.url }))
  const body = await signUpBody()
  await signUp(body)
  const barrier = new EventEmitter()
  const held = proxy.strike('find_user', { kind: 'hold', until: once(barrier, 'release') })
  const repeat = signUpSlowly(body)
  await held

  const newer = { ...body, sms_code: await issueCode(body.mobile) }
  const inserts = await holdInserts(t)
  const signUpWithNewer = signUp(newer)
  await inserts.arrived(1)
  const claim = await readClaim(body.mobile)
  barrier.emit('release')
  t.equal((await repeat).statusCode, 201)
  t.strictSame(await readClaim(body.mobile), claim)
  await inserts.release()
  t.equal((await signUpWithNewer).statusCode, 409)
})

t.test('a reset is not repeated if Postgres has lost the row: the mobile has no user', async (t) => {
  const registered = await signUpBody()
  await signUp(registered)
  const body = await signUpBody({ mobile: registered.mobile })
  t.equal((await instance.resetPassword(body)).statusCode, 200)
  await deleteUser(body.mobile)
  t.strictSame(statusAndErrno(await instance.resetPassword(body)), [422, '4004'])
})

t.test('while a request holds a code, the same code gets 503 4500 and a wrong one 422', async (t) => {
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

t.test('G4: the code of an instance that died before its INSERT works again after the lease', async (t) => {
  const env = { HASH_MAX_WAIT_MS: '600000' }
  const proxy = await openProxy(t, 'REDIS_URL')
  const dying = client(await build(t, { ...env, REDIS_URL: proxy.url }))
  const other = client(await build(t, env))
  const body = await signUpBody()
  // The code is held, but the request does not know it.
  proxy.strike(claimKey(body.mobile), { kind: 'cut', bytes: 3 })
  t.strictSame(statusAndErrno(await dying.signUp(body)), [503, '4001'])
  t.equal(await redis.exists(`sms_code_${body.mobile}`), 0)

  t.strictSame(statusAndErrno(await other.signUp(body)), [503, '4500'])
  const remainingMs = 60_000
  await ageClaim(body.mobile, leaseMsOf(config(env)) - remainingMs)
  t.strictSame(statusAndErrno(await other.signUp(body)), [503, '4500'], 'until the end of the lease')
  await ageClaim(body.mobile, remainingMs)
  t.strictSame(statusAndErrno(await other.signUp({ ...body, sms_code: 'wrong' })), [422, '4004'])
  t.equal((await other.signUp(body)).statusCode, 201)
  t.equal((await userRows(body.mobile)).length, 1)
})

t.test('G4, G5: after an INSERT of unknown outcome, the hash of the row decides', async (t) => {
  const proxy = await openProxy(t, 'DATABASE_URL')
  const { signUp } = client(await build(t, { DATABASE_URL: proxy.url }))
  for (const isSamePassword of [true, false]) {
    const body = await signUpBody()
    // The row is committed, but the request does not know it.
    proxy.strike('insert_user', { kind: 'cut', bytes: 3 })
    t.strictSame(statusAndErrno(await signUp(body)), [503, '4001'])
    t.match(await readClaim(body.mobile), { until: 0, may_have_written: true })
    t.equal(await redis.exists(`sms_code_${body.mobile}`), 0, 'the code stays in its claim')

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
  'G5: a repeat holds the code while it compares its password with the row, so its instance may die',
  async (t) => {
    const proxy = await openProxy(t, 'DATABASE_URL')
    const { signUp } = client(await build(t, { DATABASE_URL: proxy.url }))
    const body = await signUpBody()
    proxy.strike('insert_user', { kind: 'cut', bytes: 3 })
    t.strictSame(statusAndErrno(await signUp(body)), [503, '4001'])
    await until('the row is committed', async () => (await userRows(body.mobile)).length === 1)

    const barrier = new EventEmitter()
    const held = proxy.strike('find_user', { kind: 'hold', until: once(barrier, 'release') })
    const repeat = retried(() => signUp(body))
    await held
    t.ok((await readClaim(body.mobile)).until > 0)
    barrier.emit('release')
    t.equal((await repeat).statusCode, 201)
  }
)

t.test('G5: a request with another password does not end the repeats of an earlier one', async (t) => {
  const proxy = await openProxy(t, 'DATABASE_URL')
  const { signUp } = client(await build(t, { DATABASE_URL: proxy.url }))
  const body = await signUpBody()
  proxy.strike('insert_user', { kind: 'cut', bytes: 3 })
  t.strictSame(statusAndErrno(await signUp(body)), [503, '4001'])
  await until('the row is committed', async () => (await userRows(body.mobile)).length === 1)

  t.strictSame(statusAndErrno(await retried(() => signUp(withOtherPassword(body)))), [409, '4003'])
  const repeat = await signUp(body)
  t.strictSame([repeat.statusCode, repeat.headers['idempotent-replayed']], [201, 'true'])
  t.strictSame(statusAndErrno(await signUp(withOtherPassword(body))), [409, '4003'], 'the second wrong password')
  t.strictSame(statusAndErrno(await signUp(body)), [422, '4004'])
})

t.test('G5: the code of an instance that died after its INSERT gives the same success after the lease', async (t) => {
  const proxy = await openProxy(t, 'REDIS_URL')
  const dying = client(await build(t, { REDIS_URL: proxy.url }))
  const body = await signUpBody()
  // Neither the session nor the end of the hold reaches Redis.
  proxy.strike('session:', { kind: 'reset' })
  const first = await dying.signUp(body)
  t.match([first.statusCode, first.json()], [201, { data: { session: false } }])
  t.ok((await readClaim(body.mobile)).until > 0)
  t.strictSame(statusAndErrno(await signUp(body)), [503, '4500'])
  await ageClaim(body.mobile, leaseMsOf(config()))
  const repeat = await signUp(body)
  t.match(repeat.json(), { errno: '0', data: { user_id: first.json().data.user_id, session: true } })
})

t.test(
  'if Redis does not answer the release after a conflict, a repeat knows: the hash of the row decides',
  async (t) => {
    const body = await signUpBody()
    t.equal((await signUp(body)).statusCode, 201)
    for (const [again, status] of [
      [body, 201],
      [withOtherPassword(body), 409]
    ] as const) {
      const proxy = await openProxy(t, 'REDIS_URL')
      const { signUp } = client(await build(t, { REDIS_URL: proxy.url }))
      const second = { ...again, sms_code: await issueCode(body.mobile) }
      const struck = proxy.strike(claimKey(body.mobile), { kind: 'reset' }, 1)
      t.strictSame(statusAndErrno(await signUp(second)), [503, '4001'])
      await struck
      await ageClaim(body.mobile, leaseMsOf(config()))
      t.equal((await instance.signUp(second)).statusCode, status)
    }
  }
)

t.test('G4: after a failure before the INSERT, the same request works at once, for as long as the code', async (t) => {
  const body = await signUpBody()
  await redis.pexpire(`sms_code_${body.mobile}`, 3_000_000)
  t.strictSame(statusAndErrno(await failing.signUp(body)), [500, '4500'])
  const claim = await readClaim(body.mobile)
  t.strictSame([claim.until, claim.may_have_written], [0, undefined])
  t.ok((await redis.pttl(claimKey(body.mobile))) > 2_900_000)
  t.equal((await signUp(withOtherPassword(body))).statusCode, 201, 'also with another password')
})

t.test('G1: of two requests that hold a code one after the other, one signs up, and both learn it', async (t) => {
  for (const isSamePassword of [true, false]) {
    const barrier = new EventEmitter()
    const slow = await buildHashingAfter(t, () => once(barrier, 'open'))
    const body = await signUpBody()
    const first = client(slow).signUp(body)
    await untilHeld(body)
    await ageClaim(body.mobile, leaseMsOf(config()))
    const second = await signUp(isSamePassword ? body : withOtherPassword(body))
    t.equal(second.statusCode, 201)
    await until('the slow request is at the barrier', () => barrier.listenerCount('open') === 1)
    const claim = await readClaim(body.mobile)
    barrier.emit('open')
    const reply = await first
    t.equal(reply.statusCode, isSamePassword ? 201 : 409)
    if (isSamePassword) t.equal(reply.json().data.user_id, second.json().data.user_id)
    t.equal((await userRows(body.mobile)).length, 1)
    t.strictSame(await readClaim(body.mobile), claim, 'the slow one does not hold the code any more')
  }
})

t.test('G4: a newer code that the gateway refuses leaves the claim of a code that was presented', async (t) => {
  const body = await signUpBody()
  t.equal((await failing.signUp(body)).statusCode, 500)
  const app = await build(t)
  const { code } = await app.mobileSignup.codes.issue(body.mobile, 'sign_up', { id: 'a message', network: '192.0.2.1' })
  await app.mobileSignup.codes.withdraw(body.mobile, code)
  t.equal((await signUp(body)).statusCode, 201)
})

t.test('a full Redis refuses the hold and keeps the code', async (t) => {
  t.teardown(emptyRedis)
  const body = await signUpBody()
  await fillRedis()
  t.strictSame(statusAndErrno(await signUp(body)), [503, '4001'])
  t.equal(await redis.get(`sms_code_${body.mobile}`), body.sms_code)
  await emptyRedis()
  t.equal((await signUp(body)).statusCode, 201)
})

t.test('G4: if a full Redis refuses the release, the code works again after the lease', async (t) => {
  const fillRedisAndFail = async () => {
    await fillRedis()
    await failToHash()
  }
  const filling = await buildHashingAfter(t, fillRedisAndFail)
  t.teardown(emptyRedis)
  const body = await signUpBody()
  t.strictSame(statusAndErrno(await client(filling).signUp(body)), [500, '4500'])
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
