import t from 'tap'
import { client } from '../testkit/client.js'
import { sessionIdOf, sessionKeyOf, startTestbed } from '../testkit/testbed.js'

/*
 * What Redis has of the sessions of a user: the sessions, their index and their epoch. test/epochs.test.ts has what races with
 * the end of an epoch.
 */

const { build, cookieOf, redis, signUpBody } = await startTestbed(t)

const app = await build(t)
const api = client(app)

/** Signs a new user up. */
async function registerUser() {
  const { mobile, password, ...body } = await signUpBody()
  const reply = await api.signUp({ mobile, password, ...body })
  const userId = reply.json().data.user_id
  const cookie = cookieOf(reply)
  return { login: { mobile, password }, mobile, userId, cookie, index: `sessions_of:${userId}` }
}

t.test('a stored session has the user and the fields of its cookie', async (t) => {
  const before = Date.now()
  const { userId, mobile, cookie } = await registerUser()
  const { cookie: stored, ...session } = JSON.parse((await redis.get(sessionKeyOf(cookie))) ?? '{}')
  t.strictSame(session, { user_id: userId, name: mobile, mobile, epoch: 0 })
  const { expires, ...attributes } = stored
  t.strictSame(attributes, {
    path: '/',
    httpOnly: true,
    sameSite: 'lax',
    secure: false,
    originalMaxAge: 86_400_000
  })
  const expiryMs = Date.parse(expires) - 86_400_000
  t.ok(before <= expiryMs && expiryMs <= Date.now())
})

t.test('the index of a user has the sessions that live, by the time at which they expire', async (t) => {
  const { login, cookie: former, index } = await registerUser()
  const now = Math.floor(Date.now() / 1_000)
  await redis.zadd(index, now - 1, 'expired')
  await redis.zadd(index, now + 600, 'other')
  const cookie = cookieOf(await api.logIn(login, { headers: { cookie: former } }))
  t.strictSame(await redis.zrange(index, 0, '-1'), ['other', sessionIdOf(cookie)], 'without the one that was replaced')
  const expiry = Number(await redis.zscore(index, sessionIdOf(cookie)))
  t.ok(now + 86_400 <= expiry && expiry <= Math.ceil(Date.now() / 1_000) + 86_400)
  const ttlSeconds = await redis.ttl(index)
  t.ok(ttlSeconds > 86_300 && ttlSeconds <= 86_400)
})

t.test('the hundredth session of a user ends no other', async (t) => {
  const { login, cookie, index } = await registerUser()
  const later = Math.floor(Date.now() / 1_000) + 1_000
  await redis.zadd(index, ...Array.from({ length: 98 }, (_, n) => [later, `earlier-${n}`]).flat())
  t.equal((await api.logIn(login)).statusCode, 201)
  t.equal(await redis.zcard(index), 100)
  t.equal((await api.whoAmI(cookie)).statusCode, 200)
})

t.test('a user has at most 100 sessions: one more ends the oldest', async (t) => {
  const { login, index } = await registerUser()
  const later = Math.floor(Date.now() / 1_000) + 1_000
  await redis.zadd(index, ...Array.from({ length: 99 }, (_, n) => [later + n, `earlier-${n}`]).flat())
  await redis.mset('session:earlier-0', '{}', 'session:earlier-1', '{}')
  t.equal((await api.logIn(login)).statusCode, 201)
  t.equal(await redis.zcard(index), 100)
  t.strictSame(await redis.mget('session:earlier-0', 'session:earlier-1'), [null, '{}'])
})

t.test('a session of an epoch that has ended does not start', async (t) => {
  const { login, userId, index } = await registerUser()
  await app.mobileSignup.sessions.endBefore(userId, 1)
  t.equal((await api.logIn(login)).statusCode, 401)
  t.equal(await redis.exists(index), 0)
})

t.test('a new epoch deletes the sessions of the index, and lasts for two days', async (t) => {
  const { login, userId, cookie, index } = await registerUser()
  const cookies = [cookie]
  for (let n = 0; n < 3; n++) cookies.push(cookieOf(await api.logIn(login)))
  await app.mobileSignup.sessions.endBefore(userId, 1)
  for (const cookie of cookies) t.equal(await redis.exists(sessionKeyOf(cookie)), 0)
  t.equal(await redis.exists(index), 0)
  const epochKey = `{${index}}:epoch`
  t.equal(await redis.get(epochKey), '1')
  const ttlSeconds = await redis.ttl(epochKey)
  t.ok(ttlSeconds > 172_700 && ttlSeconds <= 172_800, 'longer than a session')

  await app.mobileSignup.sessions.endBefore(userId, 5)
  await app.mobileSignup.sessions.endBefore(userId, 3)
  t.equal(await redis.get(epochKey), '5', 'an epoch never falls')
})

t.test('the first epoch that ends ends also a session that is in no index', async (t) => {
  const { userId, cookie, index } = await registerUser()
  await redis.del(index)
  await app.mobileSignup.sessions.endBefore(userId, 1)
  t.equal((await api.whoAmI(cookie)).statusCode, 401)
})
