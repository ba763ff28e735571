import t from 'tap'
import { build, cookieOf, newMobile, redis } from './helper.js'

t.test('the whole journey: code, sign-up, who am I, log out, log in, a new password', async (t) => {
  const app = await build(t, { SMS_RESEND_S: '0' })
  const api = (method: 'GET' | 'POST' | 'PUT' | 'DELETE', path: string, payload?: object, cookie = '') =>
    app.inject({ method, url: `/api/v1.0${path}`, ...(payload && { payload }), headers: cookie ? { cookie } : {} })
  const mobile = newMobile()
  const password = 'correct horse battery'

  t.equal((await api('POST', '/sms_codes', { mobile })).statusCode, 202)
  const signedUp = await api('POST', '/users', {
    mobile,
    sms_code: await redis.get(`sms_code_${mobile}`),
    password,
    password2: password
  })
  t.equal(signedUp.statusCode, 201)
  const { user_id } = signedUp.json().data

  const me = await api('GET', '/session', undefined, cookieOf(signedUp))
  t.strictSame(me.json().data, { user_id, name: mobile, mobile })
  t.equal((await api('DELETE', '/session', undefined, cookieOf(signedUp))).statusCode, 200)
  t.equal((await api('GET', '/session', undefined, cookieOf(signedUp))).statusCode, 401)

  const loggedIn = await api('POST', '/sessions', { mobile, password })
  t.strictSame([loggedIn.statusCode, loggedIn.json().data.user_id], [201, user_id])

  t.equal((await api('POST', '/sms_codes', { mobile })).statusCode, 202)
  const renewed = 'staple correct horse'
  const reset = await api('PUT', '/users/password', {
    mobile,
    sms_code: await redis.get(`sms_code_${mobile}`),
    password: renewed,
    password2: renewed
  })
  t.strictSame([reset.statusCode, reset.json().data.user_id], [200, user_id])
  t.equal((await api('GET', '/session', undefined, cookieOf(loggedIn))).statusCode, 401)
  t.equal((await api('POST', '/sessions', { mobile, password })).statusCode, 401)
  t.equal((await api('POST', '/sessions', { mobile, password: renewed })).statusCode, 201)
})
