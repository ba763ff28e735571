import { EventEmitter, once } from 'node:events'
import { hash } from '@node-rs/argon2'
import t from 'tap'
import { HashQueue, QueueFull } from '#src/passwords/hash-queue.js'
import { client, type Reply, statusAndErrno } from '../testkit/client.js'
import { holdHashes } from '../testkit/hold-hashes.js'
import { patient, startTestbed } from '../testkit/testbed.js'
import { retried, until } from '../testkit/until.js'

/*
 * POST /sessions: limits on failures (G8), device tokens, places in the hash queue, and stored hashes.
 */

const testbed = await startTestbed(t)
const { build, buildWithLog, cookieOf, holdInserts, newMobile, openProxy } = testbed
const { postgres, redis, signUpBody, stores, tokenOf, userRows } = testbed

const secret = `${stores.environment.SESSION_SECRET}`
const newerSecret = 'a newer secret of at least thirty-two characters'
const yearSeconds = 31_536_000

const app = await build(t)
const api = client(app)
const [redisProxy, postgresProxy] = [await openProxy(t, 'REDIS_URL'), await openProxy(t, 'DATABASE_URL')]
const proxied = { REDIS_URL: redisProxy.url, DATABASE_URL: postgresProxy.url }
const otherApp = await build(t, { ...proxied, LOGIN_IP_HOURLY_MAX: '0' })
const otherApi = client(otherApp)
const rotatedApi = client(await build(t, { SESSION_SECRET: `${newerSecret},${secret}`, LOGIN_IP_HOURLY_MAX: '1' }))

/** Returns the device cookie of a reply, as `name=value`. */
const deviceOf = ({ cookies }: Pick<Reply, 'cookies'>) =>
  cookies.flatMap(({ name, value }) => (name === 'device' ? `${name}=${value}` : [])).join()

async function registerUser() {
  const body = await signUpBody()
  const reply = await api.signUp(body)
  cookieOf(reply)
  const { mobile, password } = body
  return { body, mobile, login: { mobile, password }, wrong: { mobile, password: 'wrong' }, device: deviceOf(reply) }
}

const logIn = (body: object, from = '192.0.2.1', cookie = '', { logIn } = api) =>
  logIn(body, { from, headers: { cookie } })
const statusOf = async (...args: Parameters<typeof logIn>) => (await logIn(...args)).statusCode

const failureKeys = (mobile: string) => redis.keys(`login_failures:*${mobile}*`)
const phcOf = async (mobile: string): Promise<string> => (await userRows(mobile))[0].password_hash

t.test('401 4102: a wrong password, a short one and an unknown mobile get the same reply', async (t) => {
  const { mobile, wrong } = await registerUser()
  const hashes = t.capture(HashQueue.prototype, 'run', HashQueue.prototype.run)
  for (const body of [wrong, { mobile, password: 'w' }, { ...wrong, mobile: newMobile() }]) {
    const reply = await logIn(body)
    t.strictSame([reply.statusCode, reply.json()], [401, { errno: '4102', errmsg: '用户名或密码错误' }])
    t.strictSame([reply.cookies.length, hashes().length], [0, 1], 'and each takes the time of a hash')
  }
})

t.test('G8: 5 failures in ten minutes refuse a mobile from one network, but not from others', async (t) => {
  const { login, wrong } = await registerUser()
  for (const expected of [401, 401, 401, 401]) t.equal(await statusOf(wrong), expected)
  t.equal(await statusOf(login), 201, 'a success sets the failures of this network to zero')
  for (const expected of [401, 401, 401, 401, 401]) t.equal(await statusOf(wrong), expected)
  const refused = await logIn(login)
  t.strictSame(statusAndErrno(refused), [429, '4201'])
  const retryAfterSeconds = Number(refused.headers['retry-after'])
  t.ok(retryAfterSeconds > 590 && retryAfterSeconds <= 600, `${retryAfterSeconds} s`)
  t.equal(await statusOf(login, '192.0.2.2'), 201, 'another address is not refused')
  t.equal(await statusOf({ ...wrong, mobile: newMobile() }), 401, 'another mobile is not refused')
})

t.test('G8: of 40 simultaneous guesses on two instances exactly 5 are verified, also those of a device', async (t) => {
  const { wrong, device } = await registerUser()
  for (const cookie of ['', device]) {
    const guesses = Array.from({ length: 40 }, (_, n) => statusOf(wrong, '192.0.2.1', cookie, n % 2 ? api : otherApi))
    const statuses = await Promise.all(guesses)
    t.equal(statuses.filter((status) => status === 401).length, 5)
    t.equal(statuses.filter((status) => status === 429).length, 35)
  }
})

t.test('G8: 100 failures in a day refuse a mobile from all networks, and a success clears none of them', async (t) => {
  const { login, wrong } = await registerUser()
  for (let n = 0; n < 99; n++) t.equal(await statusOf(wrong, `192.0.${n}.1`), 401)
  t.equal(await statusOf(login, '192.0.100.1'), 201)
  t.equal(await statusOf(wrong, '192.0.100.1'), 401)
  t.strictSame([await statusOf(wrong, '192.0.101.1'), await statusOf(wrong, '192.0.101.2')], [429, 429])
  const reply = await logIn(login, '198.51.100.1')
  t.equal(reply.statusCode, 429)
  t.ok(Number(reply.headers['retry-after']) > 86_000)
})

t.test('G8: LOGIN_IP_HOURLY_MAX failures refuse a network for all mobiles; a success takes its own back', async (t) => {
  const { login } = await registerUser()
  const fail = (from: string) => statusOf({ mobile: newMobile(), password: 'spring2026' }, from, '', rotatedApi)
  const succeed = (from: string) => statusOf(login, from, '', rotatedApi)
  for (let n = 0; n < 3; n++) t.equal(await succeed('192.0.2.50'), 201)
  t.strictSame([await fail('192.0.2.50'), await fail('192.0.2.50')], [401, 429])
  t.strictSame([await succeed('192.0.2.50'), await succeed('192.0.2.51')], [429, 201])
  for (let n = 0; n < 64; n += 16) {
    const ofSite = Array.from({ length: 16 }, (_, index) => fail(`2001:db8:0:${n + index}::1`))
    t.ok((await Promise.all(ofSite)).every((status) => status === 401))
  }
  t.equal(await fail('2001:db8:0:999::1'), 429, 'a /48 has 64 times the number')
  t.equal(await statusOf(login, '192.0.2.50', '', otherApi), 201, '0 is no limit')
})

t.test('503 4001: a login that fails because of a store counts as no failure', async (t) => {
  const { mobile, login } = await registerUser()
  postgresProxy.strike(mobile, { kind: 'reset' })
  t.strictSame(statusAndErrno(await otherApi.logIn(login)), [503, '4001'])
  t.strictSame(await failureKeys(mobile), [])
  t.equal((await retried(() => otherApi.logIn(login))).statusCode, 201)
  redisProxy.strike('session:', { kind: 'reset' })
  t.strictSame(statusAndErrno(await otherApi.logIn(login)), [503, '4001'], 'its session cannot be stored')
  t.equal((await retried(() => otherApi.logIn(login))).statusCode, 201)
})

t.test('G8: a success clears the failures of the mobile and network, and no try that is in flight', async (t) => {
  const { mobile, login, wrong } = await registerUser()
  const pair = `login_failures:{${mobile}}:192.0.2.1`
  const barrier = new EventEmitter()
  const { passwords } = otherApp.mobileSignup
  const verifyPassword = passwords.verify
  t.intercept(passwords, 'verify', {
    value: (...args: Parameters<typeof verifyPassword>) => once(barrier, 'open').then(() => verifyPassword(...args))
  })
  // Tries are in flight before, between and after the failed ones.
  const inFlight = [logIn(wrong, '192.0.2.1', '', otherApi)]
  await until('one is in flight', async () => (await redis.zcard(pair)) === 1)
  for (let n = 0; n < 2; n++) t.equal(await statusOf(wrong), 401)
  inFlight.push(logIn(wrong, '192.0.2.1', '', otherApi))
  await until('two are in flight', async () => (await redis.zcard(pair)) === 4)
  t.equal(await statusOf(login), 201)
  for (const expected of [401, 401, 401, 429]) t.equal(await statusOf(wrong), expected)
  barrier.emit('open')
  for (const reply of inFlight) t.equal((await reply).statusCode, 401)
  t.equal(await statusOf(wrong), 429, 'they have become failures')
  t.ok((await redis.ttl(pair)) > 0)
})

t.test('G8: 3 logins of a mobile and 20 of a network wait for hashes at a time; more are refused', async (t) => {
  const [user, ...others] = [await registerUser(), ...(await Promise.all(Array.from({ length: 6 }, registerUser)))]
  const unknown = () => ({ mobile: newMobile(), password: 'wrong' })
  const other = (n: number) => others[n % 6] ?? user
  const { login, device } = user
  const hashes = holdHashes(t)
  const queued: Promise<Reply>[] = []
  const refusals = async (count: number, ...args: Parameters<typeof logIn>) => {
    for (let n = 0; n < count; n++) {
      const reply = await Promise.race([logIn(...args), hashes.joined()])
      if (reply === undefined) throw new Error('it has joined the queue')
      t.strictSame([reply.statusCode, reply.headers['retry-after']], [429, '1'])
    }
  }

  // No limit on failures stops logins with the right password. They come from one address, and from others.
  for (let n = 0; n < 3; n++) queued.push(logIn(login, `192.0.2.${n}`))
  await hashes.untilJoined(3)
  await refusals(10, login, '192.0.2.1')
  await refusals(2, user.wrong, '198.51.100.1')
  queued.push(logIn(login, '198.51.100.1', device))
  // A device that knows the mobile has a place.
  await hashes.untilJoined(4)
  for (let n = 0; n < 18; n++) queued.push(logIn(other(n).login, '203.0.113.1'))
  for (let n = 0; n < 2; n++) queued.push(logIn(unknown(), '203.0.113.1'))
  await hashes.untilJoined(24)
  await refusals(2, unknown(), '203.0.113.1')
  queued.push(logIn(unknown(), '203.0.113.2'))
  // Another network has a place. Then one address with accounts and devices of its own:
  await hashes.untilJoined(25)
  for (let n = 0; n < 18; n++) queued.push(logIn(other(n).login, '198.51.100.9', other(n).device))
  queued.push(logIn(login, '198.51.100.9', device), logIn(login, '198.51.100.9', device))
  await hashes.untilJoined(45)
  await refusals(2, login, '198.51.100.9', device)
  await refusals(1, other(0).login, '198.51.100.9', other(0).device)

  hashes.release()
  const statuses = (await Promise.all(queued)).map(({ statusCode }) => statusCode)
  t.equal(statuses.filter((status) => status === 201).length, 42)
  t.equal(statuses.filter((status) => status === 401).length, 3)
  t.strictSame(await failureKeys(user.mobile), [])
  t.equal(await statusOf(login, '203.0.113.1'), 201, 'every place has been given back')
})

t.test('a login replaces an outdated hash, but no newer one, and only if a login would have a place', async (t) => {
  // Not through a pooler: its timeout is short, and these statements wait for locks.
  const env = { DATABASE_URL: stores.databaseUrl, PG_POOLER: 'none', ...patient, HASH_PASSES: '2' }
  const { app: twoPasses, lines } = await buildWithLog(t, env)
  const { passwords } = twoPasses.mobileSignup
  const logIn = async (body: object) => (await client(twoPasses).logIn(body)).statusCode

  const { mobile, login } = await registerUser()
  t.equal(await logIn(login), 201)
  await until('the hash is replaced', async () => (await phcOf(mobile)).includes('m=64,t=2,p=1'))
  const replaced = await phcOf(mobile)
  t.equal(await logIn(login), 201)

  // A transaction that changes the password locks the row, and the rehash waits for it.
  const raced = await registerUser()
  const connection = await postgres.connect()
  const newerPhc = await hash('a newer password')
  await connection.query('BEGIN')
  await connection.query('UPDATE users SET password_hash = $2 WHERE mobile = $1', [raced.mobile, newerPhc])
  t.equal(await logIn(raced.login), 201, 'the reply does not wait for the rehash')
  await until('the rehash waits', async () => {
    const { rowCount } = await postgres.query(
      `SELECT 1 FROM pg_stat_activity WHERE query LIKE 'UPDATE users%' AND state = 'active' AND wait_event_type = 'Lock'`
    )
    return rowCount === 1
  })
  await connection.query('COMMIT')
  connection.release()

  // Each is answered before its hash is replaced, which takes as long as the attacker likes.
  const attacker = await registerUser()
  const hashes = t.capture(passwords, 'hash', passwords.hash)
  const inserts = await holdInserts(t)
  for (let n = 0; n < 6; n++) t.equal(await logIn(attacker.login), n < 3 ? 201 : 429)
  t.equal(hashes().length, 3)
  await inserts.release()

  // A login is admitted, and its rehash is not.
  const refused = await registerUser()
  const before = await phcOf(refused.mobile)
  passwords.queue.admit = (client) => {
    if (client === undefined) throw new QueueFull(1)
  }
  t.equal(await logIn(refused.login), 201)
  // The shutdown waits for rehashes.
  await twoPasses.close()
  t.strictSame(await Promise.all([mobile, raced.mobile, refused.mobile].map(phcOf)), [replaced, newerPhc, before])
  const errors = lines.filter(({ level }) => Number(level) > 30)
  t.strictSame(errors, [], 'it is no error')
})

/** Exhausts every limit that strangers can exhaust, from their addresses and from that of the owner. */
async function attack(mobile: string, from = '192.0.2.1'): Promise<void> {
  const units = Array.from({ length: 100 }, (_, n) => [Date.now(), `failure ${n}`]).flat()
  for (const key of [`{${mobile}}`, `{${mobile}}:${from}`, `network:${from}`]) {
    await redis.zadd(`login_failures:${key}`, ...units)
  }
}

t.test('every success sends a device token for a year, which hides the mobile', async (t) => {
  const body = await signUpBody()
  const { mobile, password } = body
  const replies = [await api.signUp(body), await api.signUp(body), await api.logIn({ mobile, password })]
  const reset = await signUpBody({ mobile })
  replies.push(await api.resetPassword(reset), await api.resetPassword(reset))
  for (const reply of replies) {
    t.match(reply.cookies, [
      { name: 'sid', maxAge: 86_400 },
      { name: 'device', httpOnly: true, sameSite: 'Lax', path: '/', maxAge: yearSeconds }
    ])
    const token = deviceOf(reply)
    t.notOk(token.includes(mobile) || Buffer.from(token, 'base64url').toString('latin1').includes(mobile))
  }
  t.equal(new Set(replies.map(deviceOf)).size, replies.length, 'each has an id of its own')
})

t.test('G8: strangers cannot keep the owner out of a device that knows the mobile', async (t) => {
  const { mobile, login, device } = await registerUser()
  await attack(mobile)
  t.equal(await statusOf(login), 429)
  const reply = await logIn(login, '192.0.2.1', device)
  t.equal(reply.statusCode, 201)
  for (const cookie of [deviceOf(reply), device]) t.equal(await statusOf(login, '192.0.2.1', cookie), 201)
  const id = device.split(/[=.]/)[1]
  t.strictSame(await redis.keys(`login_failures:{device:${id}*`), [], 'a success gives its own units back')

  const other = await registerUser()
  const later = deviceOf(await logIn(other.login, '192.0.2.6', device))
  t.equal(await statusOf(login, '192.0.2.1', later), 429, 'a browser knows the mobile that was last proved in it')
})

t.test('G8: a device has 5 failures in ten minutes and 20 in a day, and they count for nobody else', async (t) => {
  const { mobile, login, wrong, device } = await registerUser()
  const recent = `login_failures:{device:${device.split(/[=.]/)[1]}}`
  for (let n = 0; n < 20; n += 5) {
    for (const status of [401, 401, 401, 401, 401, 429]) t.equal(await statusOf(wrong, '192.0.2.90', device), status)
    t.ok((await redis.ttl(recent)) <= 600, 'the keys have a TTL')
    await redis.del(recent)
  }
  const reply = await logIn(login, '192.0.2.99', device)
  t.equal(reply.statusCode, 429, 'from any network, with the right password')
  const seconds = Number(reply.headers['retry-after'])
  t.ok(seconds > 86_000 && seconds <= 86_400, `${seconds} s`)
  t.ok((await redis.ttl(`${recent}:day`)) <= 86_400)
  t.strictSame(await failureKeys(mobile), [], 'neither the mobile nor a network is counted')
  t.equal(await redis.zcard('login_failures:network:192.0.2.90'), 0)
  t.equal(await statusOf(login, '192.0.2.99'), 201, 'without the token it is a login of a stranger')
})

t.test('a device token that is forged or expired, or for another mobile, counts as absent', async (t) => {
  const [{ mobile, login, device }, other] = [await registerUser(), await registerUser()]
  const token = device.slice('device='.length)
  const [id, expiry] = token.split('.')
  const { ticket } = (await api.sendCode(mobile)).json().data
  const ofRotated = deviceOf(await logIn(login, '192.0.2.60', '', rotatedApi))
  await attack(mobile)
  for (const cookie of [
    other.device,
    `device=${ticket}`,
    ofRotated,
    `device=${tokenOf('device', mobile, yearSeconds + 1)}`,
    ...[`x${token}`, token.slice(0, -1), `${id}.${expiry}`, mobile, '%'].map((forged) => `device=${forged}`),
    `sid=${token}`
  ]) {
    t.equal(await statusOf(login, '192.0.2.1', cookie), 429, cookie)
  }
  const old = `device=${tokenOf('device', mobile, yearSeconds - 60)}`
  t.equal(await statusOf(login, '192.0.2.1', old), 201, 'in the last minute of its year')
  const several = `device=forged; ${other.device}; ${device}`
  t.equal(await statusOf(login, '192.0.2.1', several), 201, 'of several the one that verifies counts')
  // After a rotation of SESSION_SECRET the first one signs, and all verify.
  for (const cookie of [device, ofRotated]) t.equal(await statusOf(login, '192.0.2.1', cookie, rotatedApi), 201)
})
