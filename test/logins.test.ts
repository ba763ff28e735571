import { EventEmitter, once } from 'node:events'
import type { Writable } from 'node:stream'
import { hash, verify } from '@node-rs/argon2'
import t, { type Test } from 'tap'
import { HashQueue, QueueFull } from '#src/passwords/hash-queue.js'
import { client, type Reply, statusAndErrno } from '../testkit/client.js'
import { patient, startTestbed } from '../testkit/testbed.js'
import { until } from '../testkit/until.js'

const testbed = await startTestbed(t)
const {
  build,
  cookieOf,
  holdInserts,
  holdRedisWrites,
  newMobile,
  openProxy,
  postgres,
  redis,
  signUpBody,
  stores,
  userRows
} = testbed

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

const cookieHeaderOf = ({ cookies }: Reply) => cookies.map(({ name, value }) => `${name}=${value}`).join('; ')

/** From now on every hash waits until all are released. `count` says how many have joined the queue. */
function holdHashes(t: Test) {
  const barrier = new EventEmitter()
  const released = once(barrier, 'release')
  const { run } = HashQueue.prototype
  let joined = 0
  t.intercept(HashQueue.prototype, 'run', {
    value(this: HashQueue, job: () => Promise<unknown>, client?: Writable) {
      joined++
      barrier.emit('joined')
      return run.call(this, () => released.then(job), client)
    }
  })
  const release = () => barrier.emit('release')
  t.teardown(release)
  const next = () => once(barrier, 'joined').then(() => 'one more has joined the queue')
  return { release, count: () => joined, next }
}

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

t.test('429: 100 failures in a day refuse a mobile from all addresses', async (t) => {
  const { mobile, password } = await registerUser()
  const failFrom = async (address: string) =>
    (await api.logIn({ mobile, password: 'wrong' }, { from: address })).statusCode
  // Not at the same time: an instance takes three.
  for (let n = 0; n < 100; n++) t.equal(await failFrom(`192.0.${n}.1`), 401)
  t.equal((await api.logIn({ mobile, password }, { from: '192.0.2.1' })).statusCode, 429, 'a success cannot clear it')
  await redis.zrem(`login_failures:{${mobile}}`, ...(await redis.zrange(`login_failures:{${mobile}}`, '0', '0')))
  t.equal((await api.logIn({ mobile, password }, { from: '192.0.2.1' })).statusCode, 201)
  t.equal(await redis.zcard(`login_failures:{${mobile}}`), 99, 'and does not, if it can log in')
  t.equal(await failFrom('192.0.100.1'), 401)
  t.strictSame([await failFrom('192.0.101.1'), await failFrom('192.0.101.2')], [429, 429])
  const reply = await api.logIn({ mobile, password }, { from: '198.51.100.1' })
  t.equal(reply.statusCode, 429)
  t.ok(Number(reply.headers['retry-after']) > 86_000)
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
    for (let n = 0; n < 192; n += 16) {
      const ofSite = Array.from({ length: 16 }, (_, index) => fail(`2001:db8:0:${n + index}::1`))
      t.ok((await Promise.all(ofSite)).every((status) => status === 401))
    }
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

t.test('a success clears the failures of the mobile and network, and no try that is in flight', async (t) => {
  const { mobile, password } = await registerUser()
  const from = '192.0.2.60'
  const interrupted = await build(t)
  const barrier = new EventEmitter()
  const { verify } = interrupted.mobileSignup.passwords
  interrupted.mobileSignup.passwords.verify = async (...args) => {
    await once(barrier, 'open')
    return verify(...args)
  }
  const fail = () => api.logIn({ mobile, password: 'wrong' }, { from })
  const pair = `login_failures:{${mobile}}:${from}`
  // Some tries are in flight: before, between and after the failed ones.
  const inFlight = [client(interrupted).logIn({ mobile, password: 'wrong' }, { from })]
  await until('one is in flight', async () => (await redis.zcard(pair)) === 1)
  for (let n = 0; n < 2; n++) t.equal((await fail()).statusCode, 401)
  inFlight.push(client(interrupted).logIn({ mobile, password: 'wrong' }, { from }))
  await until('two are in flight', async () => (await redis.zcard(pair)) === 4)
  t.equal((await api.logIn({ mobile, password }, { from })).statusCode, 201)
  t.equal(await redis.zcard(pair), 2)
  for (let n = 0; n < 3; n++) t.equal((await fail()).statusCode, 401)
  t.equal((await fail()).statusCode, 429)
  barrier.emit('open')
  for (const reply of inFlight) t.equal((await reply).statusCode, 401)
  t.equal((await fail()).statusCode, 429, 'they have become failures')
  t.ok((await redis.ttl(pair)) > 0)
})

t.test(
  '429: 3 logins of a mobile and 20 of a network are in the hash queue at a time; more count nowhere',
  async (t) => {
    const app = await build(t)
    const { logIn } = client(app)
    const users = await Promise.all(Array.from({ length: 7 }, registerUser))
    const [user, ...others] = users
    if (user === undefined) throw new Error('no user')
    const deviceOf = async (login: { mobile: string; password: string }) => `${cookieHeaderOf(await api.logIn(login))}`
    const device = await deviceOf(user)
    const devices = await Promise.all(others.map(deviceOf))
    const hashes = holdHashes(t)
    const queued: Promise<Reply>[] = []
    const send = (body: object, from: string, cookie = '') => logIn(body, { from, headers: { cookie } })
    const refusals = async (count: number, ...args: Parameters<typeof send>) => {
      for (let n = 0; n < count; n++) {
        const reply = await Promise.race([send(...args), hashes.next()])
        if (typeof reply === 'string') throw new Error(reply)
        t.strictSame([reply.statusCode, reply.headers['retry-after']], [429, '1'])
      }
    }

    // Its own logins with the right password, which no limit on failures stops: from one address, and from others.
    for (let n = 0; n < 3; n++) queued.push(send(user, `192.0.2.${n}`))
    await until('they are in the queue', () => hashes.count() === 3)
    await refusals(20, user, '192.0.2.1')
    await refusals(5, { ...user, password: 'wrong' }, '198.51.100.1')
    queued.push(send(user, '198.51.100.1', device))
    await until('a device that knows the mobile has a place', () => hashes.count() === 4)
    for (let n = 0; n < 18; n++) queued.push(send({ ...others[n % 6] }, '203.0.113.1'))
    for (let n = 0; n < 2; n++) queued.push(send({ mobile: newMobile(), password: 'wrong' }, '203.0.113.1'))
    await until('the network has its 20', () => hashes.count() === 24)
    await refusals(5, { mobile: newMobile(), password: 'wrong' }, '203.0.113.1')
    queued.push(send({ mobile: newMobile(), password: 'wrong' }, '203.0.113.2'))
    await until('another network has a place', () => hashes.count() === 25)
    // One address with accounts and devices of its own.
    for (let n = 0; n < 18; n++) queued.push(send({ ...others[n % 6] }, '198.51.100.9', devices[n % 6]))
    queued.push(send(user, '198.51.100.9', device), send(user, '198.51.100.9', device))
    await until('known devices of a network have their 20', () => hashes.count() === 45)
    await refusals(2, user, '198.51.100.9', device)
    await refusals(1, { ...others[0] }, '198.51.100.9', devices[0])

    hashes.release()
    const statuses = (await Promise.all(queued)).map(({ statusCode }) => statusCode)
    t.equal(statuses.filter((status) => status === 201).length, 42)
    t.equal(statuses.filter((status) => status === 401).length, 3)
    t.strictSame(await redis.keys(`login_failures:*${user.mobile}*`), [])
    t.equal((await send(user, '203.0.113.1')).statusCode, 201, 'every place has been given back')
  }
)

t.test('a success whose hash is outdated hashes it only if a login would have a place', async (t) => {
  const app = await build(t, { HASH_PASSES: '2' })
  const user = await registerUser()
  const hashes = t.capture(app.mobileSignup.passwords, 'hash', app.mobileSignup.passwords.hash)
  const inserts = await holdInserts(t)
  let started = 0
  // Each is answered before its hash is replaced, which takes as long as the attacker likes.
  for (let n = 0; n < 10; n++) {
    t.equal((await client(app).logIn(user)).statusCode, n < 3 ? 201 : 429)
    started += hashes().length
  }
  t.equal(started, 3)
  await inserts.release()
})

t.test('503 4500: a login that was admitted is refused if the queue has grown until it joins', async (t) => {
  const app = await build(t, { HASH_MAX_WAIT_MS: '0' })
  const [user, body] = [await registerUser(), await signUpBody()]
  const writes = await holdRedisWrites(t)
  const { admit } = app.mobileSignup.passwords
  let admitted = 0
  app.mobileSignup.passwords.admit = (client) => {
    admit(client)
    admitted++
  }
  const login = client(app).logIn(user)
  const signUp = client(app).signUp(body)
  await until('both are admitted', () => admitted === 2)
  const hashes = Array.from({ length: 500 }, () => app.mobileSignup.passwords.hash('a password'))
  await writes.release()
  t.strictSame(statusAndErrno(await login), [503, '4500'])
  t.equal((await signUp).statusCode, 201, 'a sign-up that holds its code is hashed')
  t.strictSame(await failureKeys(user.mobile), [])
  await Promise.all(hashes)
})

const salt = 'c29tZXNhbHQ'
const tag = 'yBiaV4pQeHIhLwCWb5CAsA'

t.test('a stored hash that can verify no password is a wrong password: 401, counted, and logged once', async (t) => {
  const lines: string[] = []
  const app = await build(t, {}, { logStream: { write: (line) => lines.push(line) } })
  const apis = { ...client(app) }
  const verified = t.capture(HashQueue.prototype, 'run', HashQueue.prototype.run)
  for (const storedHash of [
    '!',
    '*',
    '',
    ' ',
    'x',
    '$',
    '\n',
    'plain text',
    'pbkdf2:sha256:260000$c2FsdA$5fd924625f6ab16a19cc9807c7c506ae1813490e4ba675f843d5a10e0baacdb8',
    'scrypt:32768:8:1$c2FsdA$5fd924625f6ab16a19cc9807c7c506ae',
    'pbkdf2_sha256$260000$c2FsdA$xmEV/Y3ZeQXW4DKXUb4k5GKYIF8vOCJQ4tLHcoIjaXw=',
    '$2b$12$R9h/cIPz0gi.URNNX3kh2OPST9/PgBkqquzi.Ss7KIUgO2t0jWMUW',
    '$1$salt$qJH7.N4xYta3aEG/dfqo/0',
    '5f4dcc3b5aa765d61d8327deb882cf99',
    '$argon2id$',
    `$argon2id$v=19$m=64,t=1,p=1$${salt}`,
    `$argon2id$v=19$m=64,t=1,p=1$${salt}$`,
    `$argon2id$v=19$m=64,t=1,p=1$$${tag}`,
    `$argon2id$v=18$m=64,t=1,p=1$${salt}$${tag}`,
    `$argon2xx$v=19$m=64,t=1,p=1$${salt}$${tag}`,
    `$argon2id$v=19$m=7,t=1,p=1$${salt}$${tag}`,
    `$argon2id$v=19$m=64,t=0,p=1$${salt}$${tag}`,
    `$argon2id$v=19$m=64,t=1,p=0$${salt}$${tag}`,
    `$argon2id$v=19$m=64,t=1,p=9$${salt}$${tag}`,
    `$argon2id$v=19$m=064,t=1,p=1$${salt}$${tag}`,
    `$argon2id$v=19$m=-64,t=1,p=1$${salt}$${tag}`,
    `$argon2id$v=19$m=64,t=1,p=1$YQ$${tag}`,
    `$argon2id$v=19$m=64,t=1,p=1$${salt}$YQ`,
    `$argon2id$v=19$m=64,t=1,p=1$${salt}$${tag}=`,
    `$argon2id$v=19$m=64,t=1,p=1$${salt}$${tag.slice(1)}`,
    `$argon2id$v=19$m=64,t=1,p=1$${salt}$${tag}\n`,
    ` $argon2id$v=19$m=64,t=1,p=1$${salt}$${tag}`,
    // Absurd: they would take seconds, or the memory of the instance.
    `$argon2id$v=19$m=262145,t=1,p=1$${salt}$${tag}`,
    `$argon2id$v=19$m=4194304,t=1,p=1$${salt}$${tag}`,
    `$argon2i$v=19$m=262144,t=11,p=1$${salt}$${tag}`,
    `$argon2d$v=19$m=64,t=4294967295,p=1$${salt}$${tag}`,
    `$argon2id$v=19$m=99999999999,t=1,p=1$${salt}$${tag}`
  ]) {
    const body = await signUpBody()
    const { mobile, password } = body
    const { user_id } = (await apis.signUp(body)).json().data
    const reset = await signUpBody({ mobile })
    t.equal((await apis.resetPassword(reset)).statusCode, 200)
    await postgres.query('UPDATE users SET password_hash = $2 WHERE mobile = $1', [mobile, storedHash])
    lines.length = 0
    verified()
    const replies = [await apis.logIn({ mobile, password }), await apis.logIn({ mobile, password: storedHash || 'x' })]
    for (const reply of replies) t.strictSame(statusAndErrno(reply), [401, '4102'], storedHash)
    t.equal(verified().length, 2, 'each takes the time of a hash')
    t.equal(await redis.zcard(`login_failures:{${mobile}}:127.0.0.1`), 2, 'each is counted')
    t.strictSame(statusAndErrno(await apis.resetPassword(reset)), [422, '4004'], 'a repeat of a reset')
    const logged = lines.map((line) => JSON.parse(line)).filter(({ level }) => level > 30)
    t.strictSame(
      logged.map(({ level, user_id }) => [level, user_id]),
      [[40, user_id]]
    )
    t.notMatch(lines.join(''), storedHash.length > 8 ? storedHash : mobile)
  }
})

t.test('a repeat of a sign-up whose stored hash can verify no password gets 409', async (t) => {
  const body = await signUpBody()
  t.equal((await api.signUp(body)).statusCode, 201)
  await postgres.query(`UPDATE users SET password_hash = '!' WHERE mobile = $1`, [body.mobile])
  t.strictSame(statusAndErrno(await api.signUp(body)), [409, '4003'])
})

t.test('argon2 of every variant, version and safe cost logs in', async (t) => {
  const { mobile, password } = await registerUser()
  const hashes = [0, 1, 2].map((algorithm) =>
    hash(password, { algorithm, memoryCost: 128, timeCost: 2, parallelism: 4 })
  )
  for (const phc of [...(await Promise.all(hashes)), await hash(password, { memoryCost: 262_144, timeCost: 1 })]) {
    await postgres.query('UPDATE users SET password_hash = $2 WHERE mobile = $1', [mobile, phc])
    t.equal((await api.logIn({ mobile, password })).statusCode, 201, phc.slice(0, 30))
  }
})
