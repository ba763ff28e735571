import t from 'tap'
import { client } from '../testkit/client.js'
import { impatient, startTestbed } from '../testkit/testbed.js'
import { retried } from '../testkit/until.js'

const { build, cookieOf, openProxy, redis, signUpBody, userRows } = await startTestbed(t)

const app = await build(t)
const api = client(app)

/** Signs a user up. Returns the body of the sign-up, and a body that resets the password with a new code. */
async function registerUser() {
  const signUp = await signUpBody()
  const reply = await api.signUp(signUp)
  const reset = await signUpBody({ mobile: signUp.mobile })
  return { signUp, reset, userId: reply.json().data.user_id, cookie: cookieOf(reply) }
}

t.test('200: only the new password logs in, and all other sessions end', async (t) => {
  const { signUp, reset, userId, cookie } = await registerUser()
  const { mobile } = reset
  const reply = await api.resetPassword(reset)
  t.equal(reply.statusCode, 200)
  t.strictSame(reply.json(), {
    errno: '0',
    errmsg: '密码已重置',
    data: { user_id: userId, name: mobile, mobile, session: true }
  })
  t.equal((await api.whoAmI(cookie)).statusCode, 401)
  t.equal((await api.whoAmI(cookieOf(reply))).statusCode, 200)
  t.equal((await api.logIn({ mobile, password: signUp.password })).statusCode, 401)
  t.equal((await api.logIn({ mobile, password: reset.password })).statusCode, 201)
})

t.test('422 4004: a wrong code and an unknown mobile get the same reply', async (t) => {
  const { reset } = await registerUser()
  const unknown = await signUpBody()
  for (const body of [{ ...reset, sms_code: 'wrong' }, unknown, unknown]) {
    const reply = await api.resetPassword(body)
    t.strictSame([reply.statusCode, reply.json()], [422, { errno: '4004', errmsg: '短信验证码错误' }])
  }
  t.strictSame(await userRows(unknown.mobile), [])
  t.equal(await redis.exists(`sms_code_${unknown.mobile}`), 0, 'the code of an unknown mobile is used up')
  t.equal((await api.resetPassword(reset)).statusCode, 200, 'a wrong code leaves the right one')
})

t.test('400: a new password has the same rules as the first, and a refusal keeps the code', async (t) => {
  const { reset } = await registerUser()
  for (const [changes, errmsg] of [
    [{ password2: undefined }, '参数不完整'],
    [{ password2: 'another one' }, '两次密码不一致'],
    [{ password: 'short', password2: 'short' }, '密码须为8至128个字符'],
    [{ password: 'password', password2: 'password' }, '密码过于常见']
  ] as const) {
    const reply = await api.resetPassword({ ...reset, ...changes })
    t.strictSame([reply.statusCode, reply.json().errmsg], [400, errmsg])
  }
  t.equal(await redis.get(`sms_code_${reset.mobile}`), reset.sms_code)
})

t.test('a reset forgets the failed logins of the mobile, and is never refused because of them', async (t) => {
  const { reset } = await registerUser()
  const { mobile, password } = reset
  for (let n = 0; n < 5; n++) t.equal((await api.logIn({ mobile, password: 'wrong' })).statusCode, 401)
  for (let n = 0; n < 95; n++) await redis.zadd(`login_failures:{${mobile}}`, Date.now(), `failure ${n}`)
  t.equal((await api.logIn({ mobile, password })).statusCode, 429)
  t.equal((await api.resetPassword(reset)).statusCode, 200)
  t.equal((await api.logIn({ mobile, password })).statusCode, 201)
})

t.test('a server-side failure costs no code, and a retry is safe before and after the success', async (t) => {
  const proxy = await openProxy(t, 'DATABASE_URL')
  const app = await build(t, { DATABASE_URL: proxy.url, ...impatient })
  const { reset, userId } = await registerUser()
  proxy.strike(reset.mobile, { kind: 'drop reply' })
  t.equal((await client(app).resetPassword(reset)).statusCode, 503)

  const success = await retried(() => client(app).resetPassword(reset))
  t.equal(success.statusCode, 200)
  const replay = await client(app).resetPassword(reset)
  t.strictSame([replay.statusCode, replay.json(), replay.headers['idempotent-replayed']], [200, success.json(), 'true'])
  t.equal(replay.json().data.user_id, userId)
  const otherPassword = { ...reset, password: 'some other password', password2: 'some other password' }
  t.equal((await client(app).resetPassword(otherPassword)).statusCode, 422)
})

t.test('a code that was used for a sign-up resets no password, and the reverse', async (t) => {
  const { signUp, reset } = await registerUser()
  const { password, password2 } = reset
  t.equal((await api.resetPassword({ ...signUp, password, password2 })).statusCode, 422)
  t.equal((await api.resetPassword(reset)).statusCode, 200)
  t.equal((await api.signUp(reset)).statusCode, 422)
})
