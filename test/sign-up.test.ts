import assert from 'node:assert/strict'
import { verify } from '@node-rs/argon2'
import fc from 'fast-check'
import t from 'tap'
import type { Hold } from '#src/codes/codes.js'
import { Refusal } from '#src/outcomes.js'
import { client, statusAndErrno } from '../testkit/client.js'
import { claimKey, sessionKeyOf, startTestbed } from '../testkit/testbed.js'
import { retried } from '../testkit/until.js'

/*
 * A sign-up and a reset of the password, and their retries. test/contract.test.ts has what is refused before the code is touched,
 * test/races.test.ts what several requests at the same time, or with the same code, do (G1, G2, G4, G5).
 */

const { ageClaim, build, cookieOf, newMobile, openProxy, redis, signUpBody, userRows } = await startTestbed(t)

const env = { SMS_RESEND_S: '0', SMS_CODE_ATTEMPTS: '1000', SMS_GUESS_DAILY_MAX: '0' }
const app = await build(t, env)
const api = client(app)
const [redisProxy, postgresProxy] = [await openProxy(t, 'REDIS_URL'), await openProxy(t, 'DATABASE_URL')]
const otherApp = await build(t, { ...env, REDIS_URL: redisProxy.url, DATABASE_URL: postgresProxy.url })
const otherApi = client(otherApp)

/** Signs a user up. Returns the body of the sign-up, and a body that resets the password with a new code. */
async function registerUser() {
  const signUp = await signUpBody()
  const reply = await api.signUp(signUp)
  const reset = await signUpBody({ mobile: signUp.mobile })
  return { signUp, reset, userId: reply.json().data.user_id, cookie: cookieOf(reply) }
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

t.test('409: a registered mobile keeps its row and its password, and nobody is logged in', async (t) => {
  const { signUp } = await registerUser()
  const [row] = await userRows(signUp.mobile)
  const second = await signUpBody({ mobile: signUp.mobile })
  const reply = await api.signUp(second)
  t.strictSame([...statusAndErrno(reply), reply.cookies], [409, '4003', []])
  t.strictSame(await userRows(signUp.mobile), [row])
})

t.test('G5: a reset again, on any instance, ends in the same success with a new session', async (t) => {
  const { reset } = await registerUser()
  const first = await api.resetPassword(reset)
  const repeat = await otherApi.resetPassword(reset)
  t.strictSame([repeat.statusCode, repeat.json()], [200, first.json()])
  t.equal(repeat.headers['idempotent-replayed'], 'true')
  t.not(cookieOf(repeat), cookieOf(first))
  t.equal((await api.whoAmI(cookieOf(repeat))).statusCode, 200)
  const otherPassword = { ...reset, password: 'some other password', password2: 'some other password' }
  t.equal((await api.resetPassword(otherPassword)).statusCode, 422, 'another password is another request')
})

t.test('201 with session false and without a cookie: Redis fails after the row is committed', async (t) => {
  const body = await signUpBody()
  redisProxy.strike('session:', { kind: 'reset' })
  const reply = await otherApi.signUp(body)
  t.match([reply.statusCode, reply.json()], [201, { errno: '0', data: { mobile: body.mobile, session: false } }])
  t.equal(reply.headers['set-cookie'], undefined)
  t.equal((await userRows(body.mobile)).length, 1)
})

t.test('G4: a reset whose answer from Postgres is lost is answered 503, and its retry succeeds', async (t) => {
  const { reset, userId } = await registerUser()
  postgresProxy.strike(reset.mobile, { kind: 'cut', bytes: 3 })
  t.strictSame(statusAndErrno(await otherApi.resetPassword(reset)), [503, '4001'])
  const success = await retried(() => otherApi.resetPassword(reset))
  t.strictSame([success.statusCode, success.json().data.user_id], [200, userId])
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

/** What the next request with a code learns of the earlier ones. */
interface Learnt {
  mayHaveWritten: boolean
  usedBy: string | undefined
}

/** The protocol for the code of one mobile, as a model. A lease expires only in a step of its own. */
class CodeModel {
  code: string | undefined
  claim: (Learnt & { code: string; holder: number; isHeld: boolean; isLeased: boolean; wrong: number }) | undefined

  /** @returns what the request learns, or the outcome that refuses it */
  hold(presented: string, holder: number): Learnt | string {
    const former = this.claim?.code === presented ? this.claim : undefined
    if (this.code === presented) {
      this.code = undefined
      const mayHaveWritten =
        former !== undefined && (former.mayHaveWritten || former.isHeld || former.usedBy !== undefined)
      const learnt = { mayHaveWritten, usedBy: undefined }
      this.claim = { code: presented, holder, isHeld: true, isLeased: true, wrong: 0, ...learnt }
      return learnt
    }
    if (former === undefined) return 'wrong_code'
    if (former.usedBy === '') return 'used_in_vain'
    if (former.isHeld && former.isLeased) return 'busy'
    if (former.isHeld) former.mayHaveWritten = true
    Object.assign(former, { holder, isHeld: true, isLeased: true })
    return { mayHaveWritten: former.mayHaveWritten, usedBy: former.usedBy }
  }

  /** @returns whether the request has held the code */
  release(holder: number, how: string): boolean {
    const { claim } = this
    if (claim === undefined || claim.holder !== holder || !claim.isHeld) return false
    claim.isHeld = false
    if (how === 'may_have_written') claim.mayHaveWritten = true
    if (how === 'used') Object.assign(claim, { usedBy: '7', mayHaveWritten: false })
    if (how === 'used_in_vain') claim.usedBy = ''
    if (how === 'wrong_password' && ++claim.wrong === 2) {
      // An unused code has met the row of another: the conflict stays one (G5).
      if (claim.usedBy === undefined) claim.usedBy = ''
      else this.claim = undefined
    }
    return true
  }
}

const step = fc.record({
  kind: fc.oneof(
    { weight: 2, arbitrary: fc.constantFrom('hold', 'release') },
    { weight: 1, arbitrary: fc.constantFrom('issue', 'code expires', 'lease expires') }
  ),
  code: fc.constantFrom('111111', '222222'),
  isOnOther: fc.boolean(),
  /** Which of the holds so far ends, counted from the last one, and how. */
  number: fc.constantFrom(0, 0, 0, 1, 2),
  how: fc.constantFrom('unused', 'may_have_written', 'used', 'used_in_vain', 'wrong_password', 'wrong_password')
})

// Long, because most steps do nothing until a code has been issued and held.
const randomSteps = fc.asyncProperty(fc.array(step, { minLength: 10, maxLength: 30, size: 'max' }), async (steps) => {
  const mobile = newMobile()
  const codeKey = `sms_code_${mobile}`
  const model = new CodeModel()
  const holds: Hold[] = []
  for (const { kind, code, isOnOther, number, how } of steps) {
    const { log, mobileSignup } = isOnOther ? otherApp : app
    if (kind === 'issue') {
      model.code = code
      await redis.set(codeKey, code, 'EX', 300)
    } else if (kind === 'hold') {
      const expected = model.hold(code, holds.length)
      const request = { body: { mobile, sms_code: code }, ip: '192.0.2.1', log }
      const learnt = await mobileSignup.codes.hold(request, 'sign_up').catch((error) => {
        if (error instanceof Refusal) return error.outcome
        throw error
      })
      if (typeof learnt === 'string') assert.equal(learnt, expected)
      else {
        assert.deepEqual({ mayHaveWritten: learnt.mayHaveWritten, usedBy: learnt.usedBy }, expected)
        holds.push(learnt)
      }
    } else if (kind === 'release') {
      const index = holds.length - 1 - number
      const hold = holds[index]
      if (hold) assert.equal(await mobileSignup.codes.release(hold, how, '7'), model.release(index, how))
    } else if (kind === 'code expires') {
      model.code = undefined
      await redis.del(codeKey)
    } else if (model.claim) {
      model.claim.isLeased = false
      await ageClaim(mobile, 1_000_000)
    }
    assert.equal(await redis.get(codeKey), model.code ?? null)
    const claim = JSON.parse((await redis.get(claimKey(mobile))) ?? 'null')
    assert.deepEqual([claim?.code, claim?.used_by], [model.claim?.code, model.claim?.usedBy])
    if (claim) assert.ok((await redis.pttl(claimKey(mobile))) > 0, 'a claim has a TTL')
  }
})

t.test('G1, G4, G5: random steps of two instances change a code and its claim as in a model', () =>
  fc.assert(randomSteps, { numRuns: 100 })
)
