import { once } from 'node:events'
import { request } from 'node:http'
import { Signer } from '@fastify/cookie'
import t from 'tap'
import { client, type Reply, statusAndErrno } from '../testkit/client.js'
import { impatient, sessionKeyOf, startTestbed } from '../testkit/testbed.js'

const { build, cookieOf, holdRedisWrites, redis, signUpBody, stores } = await startTestbed(t)

const app = await build(t)
const api = client(app)

const notLoggedIn = { errno: '4101', errmsg: '用户未登录' }
const session = '/api/v1.0/session'
const production = {
  NODE_ENV: 'production',
  SMS: 'off',
  TRUST_PROXY: 'none',
  HASH_MEMORY_KIB: '7168',
  HASH_PASSES: '5'
}
const sessionSecret = `${stores.environment.SESSION_SECRET}`

const sessionCookiesOf = ({ cookies }: Reply) => cookies.filter(({ name }) => name.endsWith('sid'))

t.test('the cookie is sid with HttpOnly, SameSite=Lax, Path=/ and Max-Age=86400', async (t) => {
  const reply = await api.signUp(await signUpBody())
  cookieOf(reply)
  t.match(reply.cookies[0], { name: 'sid', httpOnly: true, sameSite: 'Lax', path: '/', maxAge: 86_400 })
  t.notMatch(`${reply.headers['set-cookie']}`, 'Secure')
})

t.test('COOKIE_SECURE sets __Host-sid with Secure, whatever X-Forwarded-Proto says', async (t) => {
  const app = await build(t, { ...production, TRUST_PROXY: '127.0.0.1' })
  const url = await app.listen({ port: 0, host: '127.0.0.1' })
  for (const headers of [{}, { 'x-forwarded-proto': 'https' }, { 'x-forwarded-proto': 'http' }]) {
    const reply = await client(url).signUp(await signUpBody(), { headers })
    cookieOf(reply)
    t.equal(sessionCookiesOf(reply).length, 1)
    const [cookie] = [reply.headers['set-cookie']].flat()
    t.match(cookie, /^__Host-sid=[^;]+; Max-Age=86400; Path=\/; HttpOnly; Secure; SameSite=Lax$/)
  }
})

t.test('COOKIE_SECURE=false sets sid without Secure in production', async (t) => {
  const app = await build(t, { ...production, COOKIE_SECURE: 'false' })
  const reply = await client(app).signUp(await signUpBody())
  cookieOf(reply)
  t.match(reply.cookies[0], { name: 'sid' })
  t.notMatch(`${reply.headers['set-cookie']}`, 'Secure')
})

t.test('GET /session returns who is logged in', async (t) => {
  const signedUp = await api.signUp(await signUpBody())
  const { user_id, name, mobile } = signedUp.json().data
  const reply = await api.whoAmI(cookieOf(signedUp))
  t.equal(reply.statusCode, 200)
  t.strictSame(reply.json(), { errno: '0', errmsg: '成功', data: { user_id, name, mobile } })
  t.equal(reply.headers['set-cookie'], undefined)
})

t.test('an invalid cookie is not logged in, and does not prevent a sign-up', async (t) => {
  const cookie = cookieOf(await api.signUp(await signUpBody()))
  const [id = '', signature = ''] = cookie.slice('sid='.length).split('.')
  const signedWithOtherSecret = new Signer('another secret of at least thirty-two characters').sign(id)
  const unknown = new Signer(sessionSecret).sign('an-id-that-redis-does-not-have')
  for (const value of [
    `${id}.${signature.slice(1)}`,
    `x${id}.${signature}`,
    id,
    `${id}.`,
    '.',
    '..',
    '%',
    '%E0%A4%A',
    '"',
    '\xff',
    'x'.repeat(5_000),
    signedWithOtherSecret,
    unknown
  ]) {
    const reply = await api.whoAmI(`sid=${value}`)
    t.strictSame([reply.statusCode, reply.json()], [401, notLoggedIn], value.slice(0, 20))
    const signedUp = await api.signUp(await signUpBody(), { headers: { cookie: `sid=${value}` } })
    t.equal(signedUp.statusCode, 201)
    t.equal(sessionCookiesOf(signedUp).length, 1, 'the sign-up sets one session cookie')
  }
  t.strictSame((await app.inject(session)).json(), notLoggedIn, 'no cookie at all')
})

t.test('a session that another service has overwritten with something else is not logged in', async (t) => {
  const cookie = cookieOf(await api.signUp(await signUpBody()))
  for (const value of [
    '',
    'garbage',
    'null',
    '1',
    '"text"',
    '[]',
    '{}',
    '{"user_id":"1"}',
    '{"cookie":7}',
    '{"user_id":null,"name":"n","mobile":"m"}',
    '{"user_id":{},"name":"n","mobile":"m"}',
    '{"user_id":"1","name":"n","mobile":false}'
  ]) {
    await redis.set(sessionKeyOf(cookie), value)
    const reply = await api.whoAmI(cookie)
    t.strictSame([reply.statusCode, reply.json()], [401, notLoggedIn], value)
  }
})

t.test('fields of a stored session other than its user are ignored', async (t) => {
  const cookie = cookieOf(await api.signUp(await signUpBody()))
  const key = sessionKeyOf(cookie)
  for (const extra of [
    '"__proto__":{"user_id":"2"}',
    '"isModified":1',
    '"destroy":1',
    '"cookie":{"expires":"never"}'
  ]) {
    await redis.set(key, `{${extra},"user_id":"1","name":"n","mobile":"m"}`)
    const reply = await api.whoAmI(cookie)
    t.strictSame([reply.statusCode, reply.json().data], [200, { user_id: '1', name: 'n', mobile: 'm' }], extra)
  }
  const reply = await api.logOut(cookie)
  t.strictSame([reply.statusCode, await redis.exists(key)], [200, 0])
})

t.test('DELETE /session ends the session and clears the cookie, also when nobody is logged in', async (t) => {
  const app = await build(t, { COOKIE_SECURE: 'true' })
  const cookie = cookieOf(await client(app).signUp(await signUpBody()))
  for (const headers of [{ cookie }, { cookie }, {}, { cookie: '__Host-sid=garbage' }]) {
    const reply = await app.inject({ method: 'DELETE', url: session, headers })
    t.strictSame([reply.statusCode, reply.json()], [200, { errno: '0', errmsg: '退出成功' }])
    // Browsers ignore a __Host- cookie without Secure, also when it clears.
    t.match(reply.cookies, [{ name: '__Host-sid', value: '', maxAge: 0, path: '/', secure: true }])
    t.equal(reply.cookies.length, 1)
  }
  t.equal((await client(app).whoAmI(cookie)).statusCode, 401)
  t.equal(await redis.exists(sessionKeyOf(cookie)), 0)
})

t.test('a refusal sets no session cookie, also if the session of the cookie has ended', async (t) => {
  const cookie = cookieOf(await api.signUp(await signUpBody()))
  await redis.del(sessionKeyOf(cookie))
  const reply = await api.whoAmI(cookie)
  t.strictSame(statusAndErrno(reply), [401, '4101'])
  t.equal(reply.headers['set-cookie'], undefined)
})

t.test('a sign-up starts a session with a new id, and destroys the session that it came with', async (t) => {
  const former = cookieOf(await api.signUp(await signUpBody()))
  const reply = await api.signUp(await signUpBody(), { headers: { cookie: former } })
  t.equal(sessionCookiesOf(reply).length, 1)
  t.not(cookieOf(reply), former)
  t.equal((await api.whoAmI(former)).statusCode, 401)
  t.equal((await api.whoAmI(cookieOf(reply))).json().data.mobile, reply.json().data.mobile)
})

t.test(
  'of several session cookies the one that verifies counts, also to log out or to start another session',
  async (t) => {
    const signUp = async (cookie?: string) =>
      cookieOf(await api.signUp(await signUpBody(), cookie === undefined ? {} : { headers: { cookie } }))
    const isStored = async (cookie: string) => (await redis.exists(sessionKeyOf(cookie))) === 1
    const [ended, unsigned] = [await signUp(), 'sid=an-id-without-a-signature']
    t.equal((await api.logOut(ended)).statusCode, 200)
    for (const headerWith of [
      (good: string) => `sid=bad; ${good}`,
      (good: string) => `${good}; sid=bad`,
      (good: string) => `sid=; sid; sid=%; ${unsigned}; ${good}`,
      (good: string) => `${good.slice(0, -1)}; sid=${good.slice(7)}; other=1; ${good};`,
      (good: string) => `sid=bad;${good}`,
      (good: string) => `sid="bad"; xsid=1; sid=a.b; sid=c.d;  ${good} ; sid=e`,
      (good: string) => `${ended}; ${good}`,
      (good: string) => `${good}; ${ended}`,
      (good: string) => `${good}; ${good}`
    ]) {
      const good = await signUp()
      const header = headerWith(good)
      t.strictSame([(await api.whoAmI(header)).statusCode, await isStored(good)], [200, true], header)
      const next = await signUp(header)
      t.notOk(await isStored(good), 'a sign-up ends the former session')
      const reply = await api.logOut(headerWith(next))
      t.strictSame([reply.statusCode, await isStored(next)], [200, false], 'a logout ends it')
      t.match(reply.cookies, [{ name: 'sid', value: '' }])
      const everywhere = await signUp()
      t.equal((await api.logOut(headerWith(everywhere), '?everywhere=true')).statusCode, 200)
      t.notOk(await isStored(everywhere), 'a logout everywhere ends it')
      const refused = await api.whoAmI(headerWith(everywhere))
      t.strictSame([refused.statusCode, refused.headers['set-cookie']], [401, undefined])
    }
  }
)

t.test('a header of forged session cookies costs no more than twenty signatures', async (t) => {
  const good = cookieOf(await api.signUp(await signUpBody()))
  const forged = Array.from({ length: 19 }, () => 'sid=a.b').join('; ')
  t.equal((await api.whoAmI(`${forged}; ${good}`)).statusCode, 200)
  t.equal((await api.whoAmI(`${forged}; sid=a.b; ${good}`)).statusCode, 401)
})

t.test('a refused sign-up keeps the session that it came with', async (t) => {
  const cookie = cookieOf(await api.signUp(await signUpBody()))
  const reply = await api.signUp({ ...(await signUpBody()), sms_code: 'wrong' }, { headers: { cookie } })
  t.strictSame([reply.statusCode, reply.headers['set-cookie']], [422, undefined])
  t.equal((await api.whoAmI(cookie)).statusCode, 200)
})

t.test('of several secrets the first signs, all verify, and no valid cookie is cleared', async (t) => {
  const newSecret = 'a newer secret of at least thirty-two characters'
  const after = client(await build(t, { SESSION_SECRET: `${newSecret},${sessionSecret}` }))
  const oldCookie = cookieOf(await api.signUp(await signUpBody()))
  const newCookie = cookieOf(await after.signUp(await signUpBody()))

  for (const cookie of [oldCookie, newCookie]) {
    const reply = await after.whoAmI(cookie)
    t.strictSame([reply.statusCode, reply.headers['set-cookie']], [200, undefined])
  }
  t.equal((await api.whoAmI(newCookie)).statusCode, 401, 'the first secret has signed')
  t.equal((await after.logOut(oldCookie)).statusCode, 200)
  t.equal((await api.whoAmI(oldCookie)).statusCode, 401, 'the session has ended for both')
})

t.test('503 4001: a session cannot be ended while Redis does not answer', async (t) => {
  const app = await build(t, impatient)
  const cookie = cookieOf(await client(app).signUp(await signUpBody()))
  const writes = await holdRedisWrites(t)
  const reply = await client(app).logOut(cookie)
  const replyWithoutSession = await client(app).logOut('')
  await writes.release()
  t.strictSame(statusAndErrno(reply), [503, '4001'])
  t.equal(replyWithoutSession.statusCode, 200, 'without a session there is nothing to end')
})

t.test('a request target in absolute form keeps its session', async (t) => {
  const app = await build(t)
  const cookie = cookieOf(await client(app).signUp(await signUpBody()))
  const url = new URL(await app.listen({ port: 0, host: '127.0.0.1' }))
  // Over a socket: `inject` makes every target relative.
  for (const origin of ['', 'http://gateway.internal', 'HTTPS://gateway.internal:8443']) {
    const sent = request(url, { path: `${origin}/api/v1.0/session`, headers: { cookie }, agent: false }).end()
    const [response] = await once(sent, 'response')
    t.equal(response.resume().statusCode, 200, origin)
  }
})
