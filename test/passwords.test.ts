import type { FastifyInstance } from 'fastify'
import t from 'tap'
import { FaultProxy } from './fault-proxy.js'
import { build, cookieOf, issueCode, post, redis, signUpBody, stores, userRow, whoAmI } from './helper.js'

const put = (app: FastifyInstance, payload: object) =>
  app.inject({ method: 'PUT', url: '/api/v1.0/users/password', payload })
const logIn = (app: FastifyInstance, payload: object) =>
  app.inject({ method: 'POST', url: '/api/v1.0/sessions', payload })

/** A registered user, and the body with which they choose a new password. */
async function forgetful(app: FastifyInstance) {
  const first = await signUpBody()
  const reply = await post(app, first)
  const body = await signUpBody({ mobile: first.mobile })
  return { first, body, userId: reply.json().data.user_id, cookie: cookieOf(reply) }
}

t.test('200 密码已重置: the new password logs in, the old one does not; all other sessions end', async (t) => {
  const app = await build(t)
  const { first, body, userId, cookie } = await forgetful(app)
  const reply = await put(app, body)
  t.strictSame(
    [reply.statusCode, reply.json()],
    [
      200,
      {
        errno: '0',
        errmsg: '密码已重置',
        data: { user_id: userId, name: body.mobile, mobile: body.mobile, session: true }
      }
    ]
  )
  t.strictSame([await whoAmI(app, cookie), await whoAmI(app, cookieOf(reply))], [401, 200])
  t.equal((await logIn(app, first)).statusCode, 401)
  t.equal((await logIn(app, body)).statusCode, 201)
})

t.test('422 4004 for a wrong code and for an unknown mobile, alike; both are used up', async (t) => {
  const app = await build(t)
  const { body } = await forgetful(app)
  const unknown = await signUpBody()
  for (const wrong of [{ ...body, sms_code: 'wrong' }, body, unknown, unknown]) {
    const reply = await put(app, wrong)
    t.strictSame([reply.statusCode, reply.json()], [422, { errno: '4004', errmsg: '短信验证码错误' }])
  }
  t.strictSame(await userRow(unknown.mobile), [])
  t.equal(await redis.exists(`sms_code_${body.mobile}`, `sms_code_${unknown.mobile}`), 0)
})

t.test('400: the new password keeps the rules of the first', async (t) => {
  const app = await build(t)
  const { body } = await forgetful(app)
  for (const [changes, errmsg] of [
    [{ password2: undefined }, '参数不完整'],
    [{ password2: 'another one' }, '两次密码不一致'],
    [{ password: 'short', password2: 'short' }, '密码须为8至128个字符'],
    [{ password: 'password', password2: 'password' }, '密码过于常见']
  ] as const) {
    const reply = await put(app, { ...body, ...changes })
    t.strictSame([reply.statusCode, reply.json().errmsg], [400, errmsg])
  }
  t.equal(await redis.get(`sms_code_${body.mobile}`), body.sms_code)
})

t.test('a fault of ours puts the code back, and a retry is safe, before and after the success', async (t) => {
  const proxy = await FaultProxy.open(stores.databaseUrl)
  t.teardown(() => proxy.close())
  const app = await build(t, { DATABASE_URL: proxy.url, STORE_TIMEOUT_MS: '300' })
  const { body, userId } = await forgetful(app)
  await redis.pexpire(`sms_code_${body.mobile}`, 100_000)
  proxy.strike('set_password', { kind: 'drop reply' })
  t.equal((await put(app, body)).statusCode, 503)
  t.equal(await redis.get(`sms_code_${body.mobile}`), body.sms_code)
  const life = await redis.pttl(`sms_code_${body.mobile}`)
  t.ok(life > 90_000 && life <= 100_000)

  let reply = await put(app, body)
  while (reply.statusCode === 503) reply = await put(app, body)
  t.equal(reply.statusCode, 200)
  const again = await put(app, body)
  t.strictSame([again.statusCode, again.json(), again.headers['idempotent-replayed']], [200, reply.json(), 'true'])
  t.equal(again.json().data.user_id, userId)
  const other = { ...body, password: 'some other password', password2: 'some other password' }
  t.equal((await put(app, other)).statusCode, 422)
})

t.test('a code that has reset a password signs nobody up, and the other way round', async (t) => {
  const app = await build(t)
  const { first, body } = await forgetful(app)
  t.equal((await put(app, { ...first, password: body.password, password2: body.password })).statusCode, 422)
  t.equal((await put(app, body)).statusCode, 422, 'the guess has used the newer code up')
  await issueCode(body.mobile, body.sms_code)
  t.equal((await put(app, body)).statusCode, 200)
  t.equal((await post(app, body)).statusCode, 422)
})
