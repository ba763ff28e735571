import { verify } from '@node-rs/argon2'
import t from 'tap'
import { client, statusAndErrno } from '../testkit/client.js'
import { sessionKeyOf, startTestbed } from '../testkit/testbed.js'
import { retried } from '../testkit/until.js'

/*
 * A sign-up and a reset of the password, and their retries. test/contract.test.ts has what is refused before the code is touched,
 * test/races.test.ts what several requests at the same time, or with the same code, do (G1, G2, G4, G5).
 */

const { build, cookieOf, newMobile, openProxy, redis, signUpBody, userRows } = await startTestbed(t)

const env = { SMS_RESEND_S: '0' }
const api = client(await build(t, env))
const proxy = await openProxy(t, 'DATABASE_URL')
const otherApi = client(await build(t, { ...env, DATABASE_URL: proxy.url }))

/** Signs a user up. Returns the body of the sign-up, and a body that resets the password with a new code. */
async function registerUser() {
  const signUp = await signUpBody()
  const reply = await api.signUp(signUp)
  const reset = await signUpBody({ mobile: signUp.mobile })
  return { signUp, reset, userId: reply.json().data.user_id }
}

t.test('a user gets a code, signs up, logs out, logs in and resets the password', async (t) => {
  const mobile = newMobile()

  /** Has a code sent, and returns the body that redeems it for a password. */
  async function redemptionBody(password: string) {
    t.equal((await api.sendCode(mobile)).statusCode, 202)
    return { mobile, sms_code: await redis.get(`sms_code_${mobile}`), password, password2: password }
  }

  const [password, newPassword] = ['correct horse battery', 'staple correct horse']
  const signedUp = await api.signUp(await redemptionBody(password))
  t.equal(signedUp.statusCode, 201)
  const { user_id } = signedUp.json().data
  const signUpCookie = cookieOf(signedUp)
  const me = (await api.whoAmI(signUpCookie)).json()
  t.strictSame(me, { errno: '0', errmsg: '成功', data: { user_id, name: mobile, mobile } })
  t.strictSame((await api.logOut(signUpCookie)).json(), { errno: '0', errmsg: '退出成功' })
  t.equal((await api.whoAmI(signUpCookie)).statusCode, 401)

  const loggedIn = await api.logIn({ mobile, password })
  const data = { user_id, name: mobile, mobile, session: true }
  t.strictSame([loggedIn.statusCode, loggedIn.json()], [201, { errno: '0', errmsg: '登录成功', data }])

  const reset = await api.resetPassword(await redemptionBody(newPassword))
  t.strictSame([reset.statusCode, reset.json()], [200, { errno: '0', errmsg: '密码已重置', data }])
  t.equal((await api.whoAmI(cookieOf(loggedIn))).statusCode, 401, 'all other sessions have ended')
  t.equal((await api.whoAmI(cookieOf(reset))).statusCode, 200)
  t.equal((await api.logIn({ mobile, password })).statusCode, 401)
  t.equal((await api.logIn({ mobile, password: newPassword })).statusCode, 201)
})

t.test('G3: after 201 the row is there, its hash verifies the password, and a session has begun', async (t) => {
  const body = await signUpBody()
  const { mobile } = body
  const reply = await api.signUp(body)
  const [row] = await userRows(mobile)
  const user = { user_id: row.id, name: mobile, mobile }
  t.match(reply.headers['content-type'], /^application\/json/)
  const data = { ...user, session: true }
  t.strictSame([reply.statusCode, reply.json()], [201, { errno: '0', errmsg: '注册成功', data }])
  t.match(row, { name: mobile, mobile, password_hash: /^\$argon2id\$v=19\$m=64,t=1,p=1\$/ })
  t.ok(await verify(row.password_hash, body.password))
  t.equal(await redis.exists(`sms_code_${mobile}`), 0, 'the code is used')

  const key = sessionKeyOf(cookieOf(reply))
  // Other services read these fields.
  const cookie = { path: '/', httpOnly: true, sameSite: 'lax', secure: false, originalMaxAge: 86_400_000 }
  t.match(JSON.parse((await redis.get(key)) ?? ''), { ...user, cookie })
  const ttlSeconds = await redis.ttl(key)
  t.ok(ttlSeconds > 86_300 && ttlSeconds <= 86_400, `${ttlSeconds} s`)
})

t.test('the hash has the NFKC form of the password, and a login any form; nothing else uses it', async (t) => {
  // Full-width letters and a ligature: 8 characters as sent, 9 after NFKC.
  for (const [password, canonical] of [
    ['ｆｕｌｌｗｄ1ﬁ', 'fullwd1fi'],
    ['😀'.repeat(128), '😀'.repeat(128)]
  ] as const) {
    const body = await signUpBody({ password, password2: password })
    const { mobile } = body
    t.equal((await api.signUp({ ...body, password2: `${canonical} ` })).json().errmsg, '两次密码不一致')
    t.equal((await api.signUp(body)).statusCode, 201)
    const [row] = await userRows(mobile)
    t.ok(await verify(row.password_hash, canonical))
    for (const typed of [password, canonical]) t.equal((await api.logIn({ mobile, password: typed })).statusCode, 201)
  }
})

t.test('422: an absent, wrong or used code, and a reset of an unknown mobile; a right code stays', async (t) => {
  const { signUp, reset } = await registerUser()
  const [absent, unknown, body] = [await signUpBody(), await signUpBody(), await signUpBody()]
  await redis.del(`sms_code_${absent.mobile}`)
  for (const [send, refused] of [
    [api.signUp, absent],
    [api.signUp, { ...body, sms_code: 'wrong' }],
    [api.signUp, { ...reset, sms_code: 'used' }],
    [api.resetPassword, unknown],
    [api.resetPassword, unknown],
    [api.resetPassword, { ...reset, sms_code: 'wrong' }],
    // A used code is repeated for its own purpose only.
    [api.resetPassword, { ...reset, sms_code: signUp.sms_code }]
  ] as const) {
    const reply = await send(refused)
    t.strictSame([reply.statusCode, reply.json()], [422, { errno: '4004', errmsg: '短信验证码错误' }])
    if (refused.mobile !== reset.mobile) t.strictSame(await userRows(refused.mobile), [])
  }
  t.equal(await redis.exists(`sms_code_${unknown.mobile}`), 0, 'the code of an unknown mobile is used up')
  t.equal((await api.signUp(body)).statusCode, 201)
  t.equal((await api.resetPassword(reset)).statusCode, 200)
  t.equal((await api.signUp(reset)).statusCode, 422, 'and the reverse')
})

t.test('G4, G5: a reset whose answer was lost, and a repeat on any instance, end in the same success', async (t) => {
  const { reset, userId } = await registerUser()
  proxy.strike(reset.mobile, { kind: 'cut', bytes: 3 })
  t.strictSame(statusAndErrno(await otherApi.resetPassword(reset)), [503, '4001'])
  const first = await retried(() => otherApi.resetPassword(reset))
  t.strictSame([first.statusCode, first.json().data.user_id], [200, userId])
  const repeat = await api.resetPassword(reset)
  t.strictSame([repeat.statusCode, repeat.json()], [200, first.json()])
  t.equal(repeat.headers['idempotent-replayed'], 'true')
  t.not(cookieOf(repeat), cookieOf(first), 'with a session of its own')
  t.equal((await api.whoAmI(cookieOf(repeat))).statusCode, 200)
  const otherPassword = { ...reset, password: 'some other password', password2: 'some other password' }
  t.equal((await api.resetPassword(otherPassword)).statusCode, 422, 'another password is another request')
})

t.test('G8: a reset forgets the failed logins of the mobile, and is never refused because of them', async (t) => {
  const { reset } = await registerUser()
  const { mobile, password } = reset
  for (let n = 0; n < 5; n++) t.equal((await api.logIn({ mobile, password: 'wrong' })).statusCode, 401)
  // The hundred of the day.
  for (let n = 0; n < 95; n++) await redis.zadd(`login_failures:{${mobile}}`, Date.now(), `failure ${n}`)
  const statuses = async () => [
    (await api.logIn({ mobile, password })).statusCode,
    (await api.logIn({ mobile, password }, { from: '192.0.2.1' })).statusCode
  ]
  t.strictSame(await statuses(), [429, 429])
  t.equal((await api.resetPassword(reset)).statusCode, 200)
  t.strictSame(await statuses(), [201, 201])
})
