import t from 'tap'
import { client } from '../testkit/client.js'
import { startTestbed } from '../testkit/testbed.js'

const { build, cookieOf, newMobile, redis } = await startTestbed(t)

t.test('a user gets a code, signs up, logs out, logs in and resets the password', async (t) => {
  const api = client(await build(t, { SMS_RESEND_S: '0' }))
  const mobile = newMobile()

  /** Has a code sent, and returns the body that redeems it for a password. */
  async function redemptionBody(password: string) {
    t.equal((await api.sendCode(mobile)).statusCode, 202)
    return { mobile, sms_code: await redis.get(`sms_code_${mobile}`), password, password2: password }
  }

  const password = 'correct horse battery'
  const signedUp = await api.signUp(await redemptionBody(password))
  t.equal(signedUp.statusCode, 201)
  const { user_id } = signedUp.json().data

  const signUpCookie = cookieOf(signedUp)
  t.strictSame((await api.whoAmI(signUpCookie)).json().data, { user_id, name: mobile, mobile })
  t.equal((await api.logOut(signUpCookie)).statusCode, 200)
  t.equal((await api.whoAmI(signUpCookie)).statusCode, 401)

  const loggedIn = await api.logIn({ mobile, password })
  t.strictSame([loggedIn.statusCode, loggedIn.json().data.user_id], [201, user_id])

  const newPassword = 'staple correct horse'
  const reset = await api.resetPassword(await redemptionBody(newPassword))
  t.strictSame([reset.statusCode, reset.json().data.user_id], [200, user_id])
  t.equal((await api.whoAmI(cookieOf(loggedIn))).statusCode, 401)
  t.equal((await api.logIn({ mobile, password })).statusCode, 401)
  t.equal((await api.logIn({ mobile, password: newPassword })).statusCode, 201)
})
