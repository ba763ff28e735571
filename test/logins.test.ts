import { hash, verify } from '@node-rs/argon2'
import t from 'tap'
import { QueueFull } from '../dist/passwords/hash-queue.js'
import { client, statusAndErrno } from '../testkit/client.js'
import { patient, startTestbed } from '../testkit/testbed.js'
import { until } from '../testkit/until.js'

const { build, cookieOf, newMobile, openProxy, postgres, redis, signUpBody, stores, userRows } = await startTestbed(t)

const app = await build(t)
const api = client(app)

/** Signs a new user up. */
async function registerUser() {
  const body = await signUpBody()
  const reply = await api.signUp(body)
  const { mobile, password } = body
  return { mobile, password, userId: reply.json().data.user_id, cookie: cookieOf(reply) }
}

/** Returns the status of asking who is logged in. */
const sessionStatus = async (cookie: string) => (await api.whoAmI(cookie)).statusCode

const failureKeys = (mobile: string) => redis.keys(`login_failures:*${mobile}*`)

t.test('201: a login starts a session with a new id, and destroys the session that it came with', async (t) => {
  const { mobile, password, userId, cookie } = await registerUser()
  const reply = await api.logIn({ mobile, password }, { headers: { cookie } })
  t.equal(reply.statusCode, 201)
  t.strictSame(reply.json(), {
    errno: '0',
    errmsg: '登录成功',
    data: { user_id: userId, name: mobile, mobile, session: true }
  })
  t.equal(await sessionStatus(cookieOf(reply)), 200)
  t.equal(await sessionStatus(cookie), 401)
})

t.test('401 4102: a wrong password and an unknown mobile get the same reply', async (t) => {
  const { mobile } = await registerUser()
  const replies = [
    await api.logIn({ mobile, password: 'a wrong one' }),
    await api.logIn({ mobile: newMobile(), password: 'a wrong one' }),
    await api.logIn({ mobile, password: 'short' })
  ]
  for (const reply of replies) {
    t.strictSame([reply.statusCode, reply.json()], [401, { errno: '4102', errmsg: '用户名或密码错误' }])
    t.equal(reply.cookies.length, 0)
  }
})

t.test('400: an absent or malformed field and a password over 128 characters are refused', async (t) => {
  const mobile = newMobile()
  for (const [body, errmsg] of [
    [{ mobile }, '参数不完整'],
    [{ mobile, password: 1 }, '参数错误'],
    [{ mobile: '1', password: 'a password' }, '手机号格式错误'],
    [{ mobile, password: '§'.repeat(129) }, '密码须为8至128个字符']
  ] as const) {
    const reply = await api.logIn(body)
    t.strictSame([reply.statusCode, reply.json()], [400, { errno: '4103', errmsg }])
  }
  t.equal((await api.logIn({ mobile, password: '§'.repeat(128) })).statusCode, 401)
})

t.test('429: 5 failures in 10 minutes refuse a mobile from one address, but not from others', async (t) => {
  const { mobile, password } = await registerUser()
  const logIn = async (typedPassword: string) =>
    (await api.logIn({ mobile, password: typedPassword }, { from: '192.0.2.1' })).statusCode
  for (let n = 0; n < 4; n++) t.equal(await logIn('wrong'), 401)
  t.equal(await logIn(password), 201, 'a success sets the failures of this address to zero')
  for (let n = 0; n < 5; n++) t.equal(await logIn('wrong'), 401)
  const refused = await api.logIn({ mobile, password }, { from: '192.0.2.1' })
  t.strictSame(statusAndErrno(refused), [429, '4201'])
  const retryAfterSeconds = Number(refused.headers['retry-after'])
  t.ok(retryAfterSeconds > 590 && retryAfterSeconds <= 600, `${retryAfterSeconds} s`)
  const elsewhere = await api.logIn({ mobile, password }, { from: '192.0.2.2' })
  t.equal(elsewhere.statusCode, 201, 'another address is not refused')
  const otherMobile = await api.logIn({ mobile: newMobile(), password }, { from: '192.0.2.1' })
  t.equal(otherMobile.statusCode, 401, 'another mobile is not refused')
})

t.test('of 50 simultaneous guesses on two instances exactly 5 are verified', async (t) => {
  const clients = [api, client(await build(t))]
  const mobile = newMobile()
  const guesses = clients.flatMap(({ logIn }, instance) =>
    Array.from({ length: 25 }, (_, n) => logIn({ mobile, password: `guess ${n} on ${instance}` }))
  )
  const statuses = (await Promise.all(guesses)).map(({ statusCode }) => statusCode)
  t.equal(statuses.filter((status) => status === 401).length, 5)
  t.equal(statuses.filter((status) => status === 429).length, 45)
})

t.test('429: 100 failures in an hour refuse a mobile from all addresses', async (t) => {
  const { mobile, password } = await registerUser()
  const failFrom = async (address: string) =>
    (await api.logIn({ mobile, password: 'wrong' }, { from: address })).statusCode
  for (let network = 0; network < 10; network++) {
    const addresses = Array.from({ length: 10 }, (_, n) => `192.0.${network}.${n}`)
    t.strictSame(
      await Promise.all(addresses.map(failFrom)),
      addresses.map(() => 401)
    )
  }
  t.strictSame([await failFrom('192.0.10.1'), await failFrom('192.0.10.2')], [429, 429])
  const reply = await api.logIn({ mobile, password }, { from: '198.51.100.1' })
  t.equal(reply.statusCode, 429)
  t.ok(Number(reply.headers['retry-after']) > 3_500)
})

t.test(
  '429: LOGIN_IP_HOURLY_MAX failures refuse a network for all mobiles, and a success takes its own back',
  async (t) => {
    const api = client(await build(t, { LOGIN_IP_HOURLY_MAX: '3' }))
    const { mobile, password } = await registerUser()
    const fail = async (from: string) =>
      (await api.logIn({ mobile: newMobile(), password: 'spring2026' }, { from })).statusCode
    const succeed = async (from: string) => (await api.logIn({ mobile, password }, { from })).statusCode
    for (const expected of [401, 401]) t.equal(await fail('192.0.2.50'), expected)
    for (let n = 0; n < 5; n++) t.equal(await succeed('192.0.2.50'), 201)
    t.strictSame([await fail('192.0.2.50'), await fail('192.0.2.50')], [401, 429])
    t.equal(await succeed('192.0.2.50'), 429)
    t.equal(await succeed('192.0.2.51'), 201)
    const ofSite = Array.from({ length: 192 }, (_, n) => fail(`2001:db8:0:${n}::1`))
    t.ok((await Promise.all(ofSite)).every((status) => status === 401))
    t.equal(await fail('2001:db8:0:999::1'), 429, 'a /48 has 64 times the number')

    const unlimited = client(await build(t, { LOGIN_IP_HOURLY_MAX: '0' }))
    t.equal((await unlimited.logIn({ mobile, password }, { from: '192.0.2.50' })).statusCode, 201)
  }
)

t.test('503 4500: under overload a login is refused by admission, before its limits are touched', async (t) => {
  const app = await build(t, { HASH_THREADS: '1', HASH_MAX_WAIT_MS: '0' })
  // This queue is much longer than the refusal takes.
  const hashes = Array.from({ length: 500 }, () => app.mobileSignup.passwords.hash('a password'))
  const mobile = newMobile()
  const reply = await client(app).logIn({ mobile, password: 'a password' })
  t.strictSame(statusAndErrno(reply), [503, '4500'])
  t.strictSame(await failureKeys(mobile), [])
  await Promise.all(hashes)
})

t.test('503 4500: Retry-After of a login is the time until the hash queue may be short enough', async (t) => {
  const app = await build(t)
  app.mobileSignup.passwords.admit = () => {
    throw new QueueFull(7)
  }
  const reply = await client(app).logIn({ mobile: newMobile(), password: 'a password' })
  t.strictSame([...statusAndErrno(reply), reply.headers['retry-after']], [503, '4500', '7'])
})

t.test('503 4001: a login that fails because of Postgres is not counted as a failure', async (t) => {
  const proxy = await openProxy(t, 'DATABASE_URL')
  const app = await build(t, { DATABASE_URL: proxy.url })
  const { mobile, password } = await registerUser()
  proxy.strike(mobile, { kind: 'reset' })
  t.strictSame(statusAndErrno(await client(app).logIn({ mobile, password })), [503, '4001'])
  t.strictSame(await failureKeys(mobile), [])
})

t.test('a login replaces a hash that has outdated parameters, but never a newer password', async (t) => {
  const appWithTwoPasses = await build(t, {
    // Not through a pooler: its timeout is short, and these statements wait for locks.
    DATABASE_URL: stores.databaseUrl,
    PG_POOLER: 'none',
    ...patient,
    HASH_PASSES: '2'
  })
  const phcOf = async (mobile: string): Promise<string> => (await userRows(mobile))[0].password_hash
  const untilRehashes = (count: number, state: 'run' | 'wait for a lock') =>
    until(`${count} rehashes ${state}`, async () => {
      const { rowCount } = await postgres.query(
        `SELECT 1 FROM pg_stat_activity WHERE application_name = 'mobile-signup' AND query LIKE 'UPDATE%'
         AND state = 'active' ${state === 'run' ? '' : `AND wait_event_type = 'Lock'`}`
      )
      return rowCount === count
    })

  const { mobile, password } = await registerUser()
  t.equal((await client(appWithTwoPasses).logIn({ mobile, password: 'wrong' })).statusCode, 401)
  t.match(await phcOf(mobile), /m=64,t=1,p=1/)
  t.equal((await client(appWithTwoPasses).logIn({ mobile, password })).statusCode, 201)
  await until('the hash is replaced', async () => (await phcOf(mobile)).includes('m=64,t=2,p=1'))
  t.equal(await verify(await phcOf(mobile), password), true)

  // A transaction that changes the password locks the row, and the rehash waits for it.
  const raced = await registerUser()
  const connection = await postgres.connect()
  const newerPhc = await hash('a newer password')
  await connection.query('BEGIN')
  await connection.query('UPDATE users SET password_hash = $2 WHERE mobile = $1', [raced.mobile, newerPhc])
  const { statusCode } = await client(appWithTwoPasses).logIn({ mobile: raced.mobile, password: raced.password })
  t.equal(statusCode, 201, 'the reply does not wait for the rehash')
  await untilRehashes(1, 'wait for a lock')
  await connection.query('COMMIT')
  connection.release()
  await untilRehashes(0, 'run')
  t.equal(await phcOf(raced.mobile), newerPhc)
})

t.test('a login keeps a hash that has the present parameters, or if the hash queue is too long', async (t) => {
  const { mobile, password } = await registerUser()
  const [before] = await userRows(mobile)
  const lines: string[] = []
  const appWithTwoPasses = await build(t, { HASH_PASSES: '2' }, { logStream: { write: (line) => lines.push(line) } })
  // The login is admitted, and its rehash is not.
  appWithTwoPasses.mobileSignup.passwords.admit = (client) => {
    if (client === undefined) throw new QueueFull(1)
  }
  for (const app of [await build(t), appWithTwoPasses]) {
    t.equal((await client(app).logIn({ mobile, password })).statusCode, 201)
    // The shutdown waits for rehashes.
    await app.close()
    t.strictSame(await userRows(mobile), [before])
  }
  t.strictSame(
    lines.filter((line) => JSON.parse(line).level > 30),
    [],
    'it is no error'
  )
})

t.test('DELETE /session?everywhere=true ends all sessions of the user and no others', async (t) => {
  const [user, other] = [await registerUser(), await registerUser()]
  const { mobile, password } = user
  const newSession = async () => cookieOf(await api.logIn({ mobile, password }))
  const [second, third] = [await newSession(), await newSession()]
  for (const query of ['?everywhere=maybe', '?everywhere=true&everywhere=true']) {
    t.equal((await api.logOut(user.cookie, query)).statusCode, 400, query)
  }
  t.equal((await api.logOut('', '?everywhere=true')).statusCode, 200, 'without a session nothing ends')
  t.equal((await api.logOut(third, '?everywhere=false')).statusCode, 200)
  t.strictSame(
    [await sessionStatus(user.cookie), await sessionStatus(third)],
    [200, 401],
    'without it only one session ends'
  )
  t.equal((await api.logOut(second, '?everywhere=true')).statusCode, 200)
  t.strictSame([await sessionStatus(user.cookie), await sessionStatus(second)], [401, 401])
  t.equal(await sessionStatus(other.cookie), 200)
  t.equal(await redis.exists(`sessions_of:${user.userId}`), 0)
})

t.test('503 4001: a login fails if its session cannot be stored', async (t) => {
  const proxy = await openProxy(t, 'REDIS_URL')
  const app = await build(t, { REDIS_URL: proxy.url })
  const { mobile, password } = await registerUser()
  proxy.strike('session:', { kind: 'reset' })
  t.strictSame(statusAndErrno(await client(app).logIn({ mobile, password })), [503, '4001'])
})
