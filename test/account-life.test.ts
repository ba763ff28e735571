import t from 'tap'
import { client, statusAndErrno } from '../testkit/client.js'
import { sessionKeyOf, startTestbed } from '../testkit/testbed.js'

/** Login by code, and the deletion of an account: each holds a code, does one thing, and releases it. */

const testbed = await startTestbed(t)
const { build, cookieOf, holdInserts, issueCode, postgres, readClaim, redis, signUpBody, userRows } = testbed
const app = await build(t)
const api = client(app)

async function registerUser() {
  const body = await signUpBody()
  const reply = await api.signUp(body)
  return { ...body, userId: reply.json().data.user_id, cookie: cookieOf(reply) }
}

/** Stores another code, and returns the body that presents it. */
const present = async (mobile: string) => ({ mobile, sms_code: await issueCode(mobile) })
const sessionStatus = async (cookie: string) => (await api.whoAmI(cookie)).statusCode

t.test('201: a code logs in, as a password does, and remembers the device', async (t) => {
  const { mobile, userId } = await registerUser()
  const reply = await api.logIn(await present(mobile))
  const data = { user_id: userId, name: mobile, mobile, session: true }
  t.strictSame([reply.statusCode, reply.json()], [201, { errno: '0', errmsg: '登录成功', data }])
  t.equal(await sessionStatus(cookieOf(reply)), 200)
  t.ok(reply.cookies.some(({ name }) => name === 'device'))
})

t.test('422 4004: a wrong code and a mobile without a user get the same reply, and no cookie', async (t) => {
  const { mobile } = await registerUser()
  const unregistered = await present(testbed.newMobile())
  for (const body of [{ ...(await present(mobile)), sms_code: '000000' }, unregistered, unregistered]) {
    const reply = await api.logIn(body)
    t.strictSame(statusAndErrno(reply), [422, '4004'])
    t.equal(reply.headers['set-cookie'], undefined)
  }
})

t.test('400: of a password and a code exactly one is required, and the first fault is told', async (t) => {
  const mobile = '13812345678'
  const [password, sms_code] = ['correct horse', '123456']
  for (const [body, errmsg] of [
    [{ mobile }, '参数不完整'],
    [{ mobile, password: '', sms_code: null }, '参数不完整'],
    [{ mobile: 'x' }, '参数不完整'],
    [{ password, sms_code }, '参数不完整'],
    [{ mobile, password, sms_code }, '参数错误'],
    [{ mobile: 'x', password, sms_code }, '参数错误'],
    [{ mobile, password: 1 }, '参数错误'],
    [{ mobile, sms_code: 123456 }, '参数错误'],
    [{ mobile, sms_code: '1'.repeat(65) }, '参数错误'],
    [{ mobile, sms_code, ticket: 1 }, '参数错误'],
    [{ mobile: 'x', sms_code }, '手机号格式错误'],
    [{ mobile: 'x', password, sms_code: '' }, '手机号格式错误']
  ] as const) {
    const reply = await api.logIn(body)
    t.strictSame([reply.statusCode, reply.json().errmsg], [400, errmsg], JSON.stringify(body))
  }
})

t.test('G5: a login by code that is repeated logs in again, until a logout everywhere or a reset (G9)', async (t) => {
  const { mobile } = await registerUser()
  const body = await present(mobile)
  t.equal((await api.logIn(body)).headers['idempotent-replayed'], undefined)
  const repeat = await api.logIn(body)
  t.strictSame([repeat.statusCode, repeat.headers['idempotent-replayed']], [201, 'true'])
  t.equal((await api.logOut(cookieOf(repeat), '?everywhere=true')).statusCode, 200)
  t.strictSame(statusAndErrno(await api.logIn(body)), [422, '4004'])
})

t.test('G9: a login by code during a logout everywhere has no session', async (t) => {
  const { mobile, cookie, userId } = await registerUser()
  const slow = await build(t)
  const { find } = slow.mobileSignup.users
  slow.mobileSignup.users.find = async (mobile) => {
    const user = await find(mobile)
    await api.logOut(cookie, '?everywhere=true')
    return user
  }
  t.strictSame(statusAndErrno(await client(slow).logIn(await present(mobile))), [422, '4004'])
  t.equal(await redis.zcard(`sessions_of:${userId}`), 0)
})

t.test('200: a deletion deletes the user, ends all sessions, and its repeat changes nothing', async (t) => {
  const { mobile, password, userId, cookie } = await registerUser()
  const other = cookieOf(await api.logIn({ mobile, password }))
  for (let n = 0; n < 3; n++) await api.logIn({ mobile, password: 'a wrong password' })
  const body = await present(mobile)
  const reply = await api.deleteAccount(body)
  t.strictSame([reply.statusCode, reply.json()], [200, { errno: '0', errmsg: '注销成功' }])
  t.strictSame(await userRows(mobile), [])
  t.equal(await redis.exists(sessionKeyOf(cookie), sessionKeyOf(other)), 0)
  t.strictSame([await sessionStatus(cookie), await sessionStatus(other)], [401, 401])
  t.equal(await redis.exists(`login_failures:{${mobile}}`), 0, 'failures are forgotten')
  t.equal((await api.deleteAccount(body)).statusCode, 200)
  t.strictSame(statusAndErrno(await api.logIn({ mobile, password })), [401, '4102'])

  const again = await api.signUp(await signUpBody({ mobile }))
  t.equal(again.statusCode, 201, 'the mobile is free')
  t.not(again.json().data.user_id, userId, 'G2: no id twice')
  t.strictSame(statusAndErrno(await api.deleteAccount(body)), [422, '4004'])
  t.equal((await userRows(mobile)).length, 1, 'a former code does not delete the new user')
})

t.test('a deletion needs the code of the mobile, and succeeds, also its repeat, if there is no user', async (t) => {
  const { mobile } = await registerUser()
  t.strictSame(statusAndErrno(await api.deleteAccount({ mobile, sms_code: '000000' })), [422, '4004'])
  t.strictSame(statusAndErrno(await api.deleteAccount({ mobile })), [400, '4103'])
  t.equal((await userRows(mobile)).length, 1)
  const unregistered = await present(testbed.newMobile())
  for (let n = 0; n < 2; n++) t.equal((await api.deleteAccount(unregistered)).statusCode, 200)
})

t.test('a code that was asked for something else neither logs in nor deletes', async (t) => {
  const { mobile } = await registerUser()
  t.equal((await api.sendCode(mobile, { purpose: 'sign_up' })).statusCode, 202)
  const body = { mobile, sms_code: await redis.get(`sms_code_${mobile}`) }
  t.strictSame(statusAndErrno(await api.logIn(body)), [422, '4004'])
  t.strictSame(statusAndErrno(await api.deleteAccount(body)), [422, '4004'])
  for (const purpose of ['log_in', 'delete']) await api.sendCode(mobile, { purpose })
  t.equal((await api.logIn(body)).statusCode, 201, 'until that is asked for, too')
})

t.test('a deletion whose user gets a new session epoch meanwhile is 503, and its repeat deletes', async (t) => {
  const { mobile } = await registerUser()
  const slow = await build(t)
  const { endBefore } = slow.mobileSignup.sessions
  slow.mobileSignup.sessions.endBefore = async (...args) => {
    await endBefore(...args)
    await postgres.query('UPDATE users SET session_epoch = session_epoch + 5 WHERE mobile = $1', [mobile])
  }
  const body = await present(mobile)
  t.strictSame(statusAndErrno(await client(slow).deleteAccount(body)), [503, '4500'])
  t.equal((await readClaim(mobile)).until, 0)
  t.equal((await api.deleteAccount(body)).statusCode, 200)
  t.strictSame(await userRows(mobile), [])
})

t.test('a login during a deletion has no session afterwards', async (t) => {
  const { mobile, password, userId } = await registerUser()
  const barrier = await holdInserts(t)
  const deletion = api.deleteAccount(await present(mobile))
  await barrier.arrived(1)
  t.strictSame(statusAndErrno(await api.logIn({ mobile, password })), [401, '4102'])
  await barrier.release()
  t.equal((await deletion).statusCode, 200)
  t.equal(await redis.zcard(`sessions_of:${userId}`), 0)
})
