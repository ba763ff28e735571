import { request } from 'node:http'
import type { AddressInfo } from 'node:net'
import { Signer } from '@fastify/cookie'
import t from 'tap'
import { build, cookieOf, holdRedisWrites, post, redis, sessionSecret, signUpBody } from './helper.js'

const notLoggedIn = { errno: '4101', errmsg: '用户未登录' }
const session = '/api/v1.0/session'
const production = { NODE_ENV: 'production', SMS: 'off', HASH_MEMORY_KIB: '7168', HASH_PASSES: '5' }

t.test('the cookie: sid, HttpOnly, SameSite=Lax, Path=/, 86,400 s', async (t) => {
  const app = await build(t)
  const reply = await post(app, await signUpBody())
  t.match(reply.cookies, [{ name: 'sid', httpOnly: true, sameSite: 'Lax', path: '/', maxAge: 86_400 }])
  t.notOk(reply.cookies[0]?.secure)
  cookieOf(reply)
})

t.test('COOKIE_SECURE: __Host-sid with Secure, whatever the gateway says of its own side', async (t) => {
  const app = await build(t, { ...production, TRUST_PROXY: '127.0.0.1' })
  await app.listen({ port: 0 })
  const { port } = app.server.address() as AddressInfo
  for (const headers of [{}, { 'x-forwarded-proto': 'https' }, { 'x-forwarded-proto': 'http' }]) {
    const body = JSON.stringify(await signUpBody())
    const cookies = await new Promise((resolve, reject) => {
      const options = { port, method: 'POST', path: '/api/v1.0/users', agent: false }
      request({ ...options, headers: { 'content-type': 'application/json', ...headers } }, (reply) => {
        reply.resume()
        resolve(reply.headers['set-cookie'])
      })
        .on('error', reject)
        .end(body)
    })
    t.match(cookies, [/^__Host-sid=[^;]+; Max-Age=86400; Path=\/; HttpOnly; Secure; SameSite=Lax$/])
  }
})

t.test('COOKIE_SECURE=false in production: sid without Secure', async (t) => {
  const app = await build(t, { ...production, COOKIE_SECURE: 'false' })
  t.match((await post(app, await signUpBody())).cookies, [{ name: 'sid', secure: undefined }])
})

t.test('GET /session: who is logged in', async (t) => {
  const app = await build(t)
  const signedUp = await post(app, await signUpBody())
  const { user_id, name, mobile } = signedUp.json().data
  const reply = await app.inject({ url: session, headers: { cookie: cookieOf(signedUp) } })
  t.equal(reply.statusCode, 200)
  t.strictSame(reply.json(), { errno: '0', errmsg: '成功', data: { user_id, name, mobile } })
  t.equal(reply.headers['set-cookie'], undefined)
})

t.test('GET /session: a tampered, foreign or garbage cookie is not logged in', async (t) => {
  const app = await build(t)
  const cookie = cookieOf(await post(app, await signUpBody()))
  const [id = '', signature = ''] = cookie.slice('sid='.length).split('.')
  const foreign = new Signer('another secret of at least thirty-two characters').sign(id)
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
    foreign,
    unknown
  ]) {
    const reply = await app.inject({ url: session, headers: { cookie: `sid=${value}` } })
    t.strictSame([reply.statusCode, reply.json()], [401, notLoggedIn], value.slice(0, 20))
    const signedUp = await post(app, await signUpBody(), { cookie: `sid=${value}` })
    t.equal(signedUp.statusCode, 201, 'nor does it stop a sign-up')
    t.equal(signedUp.cookies.length, 1, 'whose reply sets one cookie')
  }
  t.strictSame((await app.inject(session)).json(), notLoggedIn, 'no cookie at all')
})

t.test('GET /session: what another service has broken in Redis is not logged in', async (t) => {
  const app = await build(t)
  const cookie = cookieOf(await post(app, await signUpBody()))
  const key = `session:${cookie.slice('sid='.length).split('.')[0]}`
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
    await redis.set(key, value)
    const reply = await app.inject({ url: session, headers: { cookie } })
    t.strictSame([reply.statusCode, reply.json()], [401, notLoggedIn], value)
  }
})

t.test('fields of a stored session that are none of its user’s do no harm', async (t) => {
  const app = await build(t)
  const cookie = cookieOf(await post(app, await signUpBody()))
  const key = `session:${cookie.slice('sid='.length).split('.')[0]}`
  for (const extra of [
    '"__proto__":{"user_id":"2"}',
    '"isModified":1',
    '"destroy":1',
    '"cookie":{"expires":"never"}'
  ]) {
    await redis.set(key, `{${extra},"user_id":"1","name":"n","mobile":"m"}`)
    const reply = await app.inject({ url: session, headers: { cookie } })
    t.strictSame([reply.statusCode, reply.json().data], [200, { user_id: '1', name: 'n', mobile: 'm' }], extra)
  }
  const reply = await app.inject({ method: 'DELETE', url: session, headers: { cookie } })
  t.strictSame([reply.statusCode, await redis.exists(key)], [200, 0])
})

t.test('DELETE /session ends the session and clears the cookie, also when nobody is logged in', async (t) => {
  const app = await build(t, { COOKIE_SECURE: 'true' })
  const cookie = cookieOf(await post(app, await signUpBody()))
  for (const headers of [{ cookie }, { cookie }, {}, { cookie: '__Host-sid=garbage' }]) {
    const reply = await app.inject({ method: 'DELETE', url: session, headers })
    t.strictSame([reply.statusCode, reply.json()], [200, { errno: '0', errmsg: '退出成功' }])
    // Browsers ignore a __Host- cookie without Secure, also when it clears.
    t.match(reply.cookies, [{ name: '__Host-sid', value: '', maxAge: 0, path: '/', secure: true }])
    t.equal(reply.cookies.length, 1)
  }
  t.equal((await app.inject({ url: session, headers: { cookie } })).statusCode, 401)
  t.equal(await redis.exists(`session:${cookie.slice('__Host-sid='.length).split('.')[0]}`), 0)
})

t.test('a sign-up has a fresh session id, and destroys the session that it came with', async (t) => {
  const app = await build(t)
  const old = cookieOf(await post(app, await signUpBody()))
  const reply = await post(app, await signUpBody(), { cookie: old })
  t.equal(reply.cookies.length, 1)
  t.not(cookieOf(reply), old)
  t.equal((await app.inject({ url: session, headers: { cookie: old } })).statusCode, 401)
  t.equal(
    (await app.inject({ url: session, headers: { cookie: cookieOf(reply) } })).json().data.mobile,
    reply.json().data.mobile
  )
})

t.test('a refused sign-up leaves the session that it came with alone', async (t) => {
  const app = await build(t)
  const cookie = cookieOf(await post(app, await signUpBody()))
  const reply = await post(app, { ...(await signUpBody()), sms_code: 'wrong' }, { cookie })
  t.strictSame([reply.statusCode, reply.headers['set-cookie']], [422, undefined])
  t.equal((await app.inject({ url: session, headers: { cookie } })).statusCode, 200)
})

t.test('secrets rotate: the first signs, all verify, and no good cookie is cleared', async (t) => {
  const newer = 'a newer secret of at least thirty-two characters'
  const before = await build(t)
  const after = await build(t, { SESSION_SECRET: `${newer},${sessionSecret}` })
  const old = cookieOf(await post(before, await signUpBody()))
  const fresh = cookieOf(await post(after, await signUpBody()))

  for (const cookie of [old, fresh]) {
    const reply = await after.inject({ url: session, headers: { cookie } })
    t.strictSame([reply.statusCode, reply.headers['set-cookie']], [200, undefined])
  }
  t.equal(
    (await before.inject({ url: session, headers: { cookie: fresh } })).statusCode,
    401,
    'the newer secret signed'
  )
  t.equal((await after.inject({ method: 'DELETE', url: session, headers: { cookie: old } })).statusCode, 200)
  t.equal((await before.inject({ url: session, headers: { cookie: old } })).statusCode, 401, 'logged out everywhere')
})

t.test('503 4001: a session cannot be ended while Redis does not answer', async (t) => {
  const app = await build(t, { STORE_TIMEOUT_MS: '100' })
  const cookie = cookieOf(await post(app, await signUpBody()))
  const writes = await holdRedisWrites()
  const reply = await app.inject({ method: 'DELETE', url: session, headers: { cookie } })
  await writes.release()
  t.strictSame([reply.statusCode, reply.json().errno], [503, '4001'])
})

t.test('a request target in absolute form keeps its session', async (t) => {
  const app = await build(t)
  const reply = await app.inject({
    method: 'POST',
    url: 'http://gateway.internal/api/v1.0/users',
    payload: await signUpBody()
  })
  t.match(reply.json(), { errno: '0', data: { session: true } })
  t.equal(reply.cookies.length, 1)
})
