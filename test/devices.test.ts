import { mock } from 'node:test'
import t from 'tap'
import { Tickets } from '#src/codes/tickets.js'
import { client, type Reply } from '../testkit/client.js'
import { startTestbed } from '../testkit/testbed.js'

/*
 * Device tokens: strangers cannot keep the owner of a mobile out of a browser in which it was proved (G8).
 */

const { build, issueCode, newMobile, redis, signUpBody, stores } = await startTestbed(t)

const secret = `${stores.environment.SESSION_SECRET}`
const newerSecret = 'a newer secret of at least thirty-two characters'
const api = client(await build(t))
const yearSeconds = 31_536_000

/** Returns the device cookie of a reply, as `name=value`. */
function deviceOf({ cookies }: Pick<Reply, 'cookies'>): string {
  const cookie = cookies.find(({ name }) => name.endsWith('device'))
  if (cookie === undefined) throw new Error('the reply sets no device cookie')
  return `${cookie.name}=${cookie.value}`
}

/** Signs a new user up. */
async function registerUser() {
  const body = await signUpBody()
  const reply = await api.signUp(body)
  return { body, login: { mobile: body.mobile, password: body.password }, device: deviceOf(reply) }
}

/** Logs in from an address, with these cookies, and returns the status. */
const logIn = async (body: object, cookie = '', from = '192.0.2.1', { logIn } = api) =>
  (await logIn(body, { from, headers: { cookie } })).statusCode

const wrong = (login: object) => ({ ...login, password: 'a wrong one' })

/** Spends every limit that strangers can spend, from the addresses of strangers and of the owner. */
async function attack(mobile: string, from = '192.0.2.1'): Promise<void> {
  const units = Array.from({ length: 100 }, (_, n) => [Date.now(), `failure ${n}`]).flat()
  for (const key of [`{${mobile}}`, `{${mobile}}:${from}`, `network:${from}`]) {
    await redis.zadd(`login_failures:${key}`, ...units)
  }
}

const deviceKeys = (device: string) => {
  const id = device.split(/[=.]/)[1]
  return [`login_failures:{device:${id}}`, `login_failures:{device:${id}}:day`] as const
}

t.test(
  'every success sends a device token for a year, beside the session cookie, and it hides the mobile',
  async (t) => {
    const body = await signUpBody()
    const { mobile, password } = body
    const signedUp = await api.signUp(body)
    const replies = [signedUp, await api.signUp(body), await api.logIn({ mobile, password })]
    const reset = await signUpBody({ mobile })
    replies.push(await api.resetPassword(reset), await api.resetPassword(reset))
    for (const reply of replies) {
      t.match(reply.cookies, [
        { name: 'sid', maxAge: 86_400 },
        { name: 'device', httpOnly: true, sameSite: 'Lax', path: '/', maxAge: yearSeconds }
      ])
      t.notMatch(`${reply.headers['set-cookie']}`, 'Secure')
      const token = deviceOf(reply)
      const decoded = Buffer.from(token, 'base64url').toString('latin1')
      t.notOk(token.includes(mobile) || decoded.includes(mobile))
    }
    t.equal(new Set(replies.map(deviceOf)).size, replies.length, 'each has an id of its own')

    const secure = await client(await build(t, { COOKIE_SECURE: 'true' })).logIn({ mobile, password: reset.password })
    t.match(secure.headers['set-cookie'], [
      /^__Host-sid=/,
      /^__Host-device=[^;]+; Max-Age=31536000; Path=\/; HttpOnly; Secure; SameSite=Lax$/
    ])
  }
)

t.test('G8: strangers cannot keep the owner out of a device that knows the mobile', async (t) => {
  const { login, device } = await registerUser()
  await attack(login.mobile)
  t.equal(await logIn(login), 429)
  const reply = await api.logIn(login, { from: '192.0.2.1', headers: { cookie: device } })
  t.equal(reply.statusCode, 201)
  t.equal(await logIn(login, deviceOf(reply)), 201, 'and with the token of that login')
  t.equal(await logIn(login, device), 201, 'in another browser the former token is still valid')
  t.equal(await redis.zcard(`login_failures:{${login.mobile}}`), 100, 'the day of the mobile is not cleared')
  t.strictSame(await redis.keys('login_failures:{device:*'), [], 'a success gives its own units back')
})

t.test('G8: a device has 5 failures in ten minutes and 20 in a day, and they count for nobody else', async (t) => {
  const { login, device } = await registerUser()
  const [recent, daily] = deviceKeys(device)
  for (let n = 0; n < 20; n += 5) {
    for (const expected of [401, 401, 401, 401, 401, 429]) t.equal(await logIn(wrong(login), device), expected)
    t.ok((await redis.ttl(recent)) <= 600, 'the keys have a TTL')
    await redis.del(recent)
  }
  const reply = await api.logIn(login, { from: '192.0.2.99', headers: { cookie: device } })
  t.equal(reply.statusCode, 429, 'from any network, with the right password')
  const seconds = Number(reply.headers['retry-after'])
  t.ok(seconds > 86_000 && seconds <= 86_400, `${seconds} s`)
  t.ok((await redis.ttl(daily)) <= 86_400)
  t.strictSame(await redis.keys(`login_failures:*${login.mobile}*`), [], 'neither the mobile nor a network is counted')
  t.equal(await redis.zcard('login_failures:network:192.0.2.99'), 0)
  t.equal(await logIn(login, '', '192.0.2.99'), 201, 'without the token it is a login of a stranger')
})

t.test('of 20 simultaneous guesses of a device exactly 5 are verified', async (t) => {
  const { login, device } = await registerUser()
  const apis = [api, client(await build(t))]
  const guess = (n: number) => logIn(wrong(login), device, `192.0.2.${n}`, apis[n % 2])
  const statuses = await Promise.all(Array.from({ length: 20 }, (_, n) => guess(n)))
  t.equal(statuses.filter((status) => status === 401).length, 5)
  t.equal(statuses.filter((status) => status === 429).length, 15)
})

t.test('a browser knows the mobile that was last proved in it', async (t) => {
  const [first, second] = [await registerUser(), await registerUser()]
  const reply = await api.logIn(second.login, { headers: { cookie: first.device } })
  t.equal(deviceOf(reply).split('=')[0], first.device.split('=')[0], 'the same cookie')
  for (const { login } of [first, second]) await attack(login.mobile, '192.0.2.7')
  t.equal(await logIn(first.login, deviceOf(reply), '192.0.2.7'), 429)
  t.equal(await logIn(second.login, deviceOf(reply), '192.0.2.7'), 201)
})

t.test('a token that is forged or expired, or for another mobile, counts as absent', async (t) => {
  const [{ login, device }, other] = [await registerUser(), await registerUser()]
  const [id, expiry, mac = ''] = device.slice('device='.length).split('.')
  const tokenOf = (ageSeconds: number, secrets: [string, ...string[]] = [secret], purpose = 'device') => {
    const now = Date.now()
    const clock = mock.method(Date, 'now', () => now - ageSeconds * 1_000)
    const token = new Tickets(secrets, purpose, yearSeconds * 1_000).issue(login.mobile)
    clock.mock.restore()
    return `device=${token}`
  }
  const { ticket } = (await api.sendCode(login.mobile)).json().data
  await attack(login.mobile)
  for (const cookie of [
    other.device,
    `device=${ticket}`,
    tokenOf(0, [secret], 'ticket'),
    tokenOf(0, [newerSecret]),
    tokenOf(yearSeconds + 1),
    `device=x${id}.${expiry}.${mac}`,
    `device=${id}.z${expiry}.${mac}`,
    `device=${id}.${expiry}.${mac.slice(1)}`,
    `device=${id}.${expiry}`,
    `device=${login.mobile}`,
    'device=',
    'device=%',
    device.replace('device=', 'sid='),
    device.replace('device=', '__Host-device='),
    ''
  ]) {
    t.equal(await logIn(login, cookie), 429, cookie)
  }
  t.equal(await logIn(login, tokenOf(yearSeconds - 60)), 201, 'in the last minute of its year')
  t.equal(
    await logIn(login, `device=forged; ${other.device}; ${device}`),
    201,
    'of several the one that verifies counts'
  )
  const signUp = {
    ...(await signUpBody({ mobile: newMobile() })),
    sms_code: 'wrong',
    ticket: device.slice('device='.length)
  }
  t.equal((await api.signUp(signUp)).statusCode, 422, 'and it is no ticket')
})

t.test('a token survives a rotation of SESSION_SECRET: the first signs, all verify', async (t) => {
  const { login, device } = await registerUser()
  const rotated = client(await build(t, { SESSION_SECRET: `${newerSecret},${secret}` }))
  const newer = deviceOf(await rotated.logIn(login))
  await attack(login.mobile)
  t.equal(await logIn(login, device, undefined, rotated), 201)
  t.equal(await logIn(login, newer, undefined, rotated), 201)
  t.equal(await logIn(login, newer), 429, 'the newest secret has signed')
})

t.test('a refusal, and a logout, set no device token', async (t) => {
  const { body, login, device } = await registerUser()
  const replies = [
    await api.logIn(wrong(login), { headers: { cookie: device } }),
    await api.signUp({ ...body, sms_code: await issueCode(body.mobile) }),
    await api.resetPassword({ ...body, sms_code: 'wrong' }),
    await api.logOut(device)
  ]
  t.strictSame(
    replies.map(({ statusCode, cookies }) => [statusCode, cookies.filter(({ name }) => name === 'device').length]),
    [
      [401, 0],
      [409, 0],
      [422, 0],
      [200, 0]
    ]
  )
})
