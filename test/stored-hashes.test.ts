import { hash } from '@node-rs/argon2'
import t from 'tap'
import { HashQueue } from '#src/passwords/hash-queue.js'
import { client, statusAndErrno } from '../testkit/client.js'
import { formerHashes } from '../testkit/former-users.js'
import { startTestbed } from '../testkit/testbed.js'

/**
 * Hashes that another system has left: a login verifies them, and replaces them by the service's own.
 */

const { buildWithLog, postgres, redis, signUpBody, userRows } = await startTestbed(t)
const { app, lines } = await buildWithLog(t, { LOGIN_IP_HOURLY_MAX: '0' })
const api = client(app)

const storeHash = (mobile: string, storedHash: string) =>
  postgres.query('UPDATE users SET password_hash = $2 WHERE mobile = $1', [mobile, storedHash])

/** Signs a user up, and gives the row another hash. */
async function registerUser(storedHash: string) {
  const body = await signUpBody()
  const { user_id } = (await api.signUp(body)).json().data
  await storeHash(body.mobile, storedHash)
  return { ...body, user_id }
}

const readHash = async (mobile: string): Promise<string> => (await userRows(mobile))[0].password_hash

t.test('a login verifies the hashes of other systems, and replaces each by one of this service', async (t) => {
  for (const [password, storedHashes] of Object.entries(formerHashes)) {
    for (const storedHash of storedHashes) {
      const { mobile } = await registerUser(storedHash)
      const wrong = await api.logIn({ mobile, password: `${password}x` })
      t.strictSame(statusAndErrno(wrong), [401, '4102'], storedHash)
      t.equal(await readHash(mobile), storedHash)
      t.equal((await api.logIn({ mobile, password })).statusCode, 201, storedHash)
      await app.mobileSignup.inFlight.drain()
      t.match(await readHash(mobile), /^\$argon2id\$v=19\$m=64,t=1,p=1\$/)
      t.equal((await api.logIn({ mobile, password })).statusCode, 201, 'with the new hash')
    }
  }
})

t.test('a login verifies hashes up to the stated cost', async (t) => {
  for (const storedHash of [
    await hash('correct horse', { memoryCost: 262_144, timeCost: 1 }),
    await hash('correct horse', { memoryCost: 128, timeCost: 2, parallelism: 4 })
  ]) {
    const { mobile } = await registerUser(storedHash)
    t.equal((await api.logIn({ mobile, password: 'correct horse' })).statusCode, 201, storedHash)
  }
})

const [salt, tag] = ['c29tZXNhbHQ', 'yBiaV4pQeHIhLwCWb5CAsA']
const [hex64, hex128] = ['5f'.repeat(32), '5f'.repeat(64)]

/** Nothing verifies them, for example because they would take seconds, or the memory of the instance. */
const refused = [
  ...['!', '*', '', ' ', '$', '\n', 'plain text', '$1$salt$qJH7.N4xYta3aEG/dfqo/0', '5f4dcc3b5aa765d61d8327deb882cf99'],
  ...['m=7,t=1,p=1', 'm=64,t=0,p=1', 'm=64,t=1,p=0', 'm=64,t=1,p=9', 'm=064,t=1,p=1'].map(
    (parameters) => `$argon2id$v=19$${parameters}$${salt}$${tag}`
  ),
  ...['m=262145,t=1,p=1', 'm=262144,t=11,p=1', 'm=64,t=4294967295,p=1', 'm=99999999999,t=1,p=1'].map(
    (parameters) => `$argon2i$v=19$${parameters}$${salt}$${tag}`
  ),
  ...[`$${tag}`, `${salt}$`, `${salt}`, `YQ$${tag}`, `${salt}$YQ`, `${salt}$${tag}=`, `${salt}$${tag}\n`].map(
    (rest) => `$argon2id$v=19$m=64,t=1,p=1$${rest}`
  ),
  `$argon2id$v=18$m=64,t=1,p=1$${salt}$${tag}`,
  ...['sha256:2000001', 'sha256:9999999', 'sha256:0', 'sha256', 'sha1:1000', 'md5:1000', 'sha512:1000'].map(
    (method) => `pbkdf2:${method}$salt$${hex64}`
  ),
  ...['pbkdf2:sha256:1000$salt$5f', `pbkdf2:sha256:1000$$${hex64}`],
  ...['131072:16:1', '1024:8:129', '1000:8:1', '1:8:1', '65536:1:1', '1024:0:1'].map(
    (cost) => `scrypt:${cost}$salt$${hex128}`
  ),
  `scrypt:1024:8:1$salt$${hex64}`,
  'pbkdf2_sha256$2000001$saltsalt$qQDPSZa3Ormyy9oK1Pu0ZLLwP2Svzmx3yu8OvDdq/J0=',
  'pbkdf2_sha256$1000$saltsalt$qQDPSZa3Ormyy9oK1Pu0ZLLwP2Svzmx3yu8OvDdq',
  ...['2b$15', '2b$03', '2x$04'].map((cost) => `$${cost}$gxiQ2ArWiKE6s5Qu31ilIuxSoK8c2Kzib9jMdkvCe7pZ1SJOLHfdC`),
  '$2b$04$gxiQ2ArWiKE6s5Qu31ilIuxSoK8c2Kzib9jMdkvCe7pZ1SJOLHfd'
]

t.test('any other hash is a wrong password: 401 in the time of a hash, counted, logged once for a user', async (t) => {
  const verified = t.capture(HashQueue.prototype, 'run', HashQueue.prototype.run)
  for (const storedHash of refused) {
    const { mobile, password, user_id } = await registerUser(storedHash)
    lines.length = 0
    verified()
    for (const tried of [password, storedHash.trim().slice(0, 128) || 'x']) {
      t.strictSame(statusAndErrno(await api.logIn({ mobile, password: tried })), [401, '4102'], storedHash)
    }
    t.equal(verified().length, 2, 'each takes the time of a hash')
    t.equal(await redis.zcard(`login_failures:{${mobile}}:127.0.0.1`), 2, 'each is counted')
    const warnings = lines.filter(({ level }) => Number(level) > 30).map(({ level, user_id }) => [level, user_id])
    t.strictSame(warnings, [[40, user_id]])
    t.notMatch(JSON.stringify(lines), storedHash.length > 8 ? storedHash : mobile)
  }
})

t.test('a password that a library refuses is a wrong one', async (t) => {
  for (const storedHash of formerHashes['correct horse'] ?? []) {
    const { mobile } = await registerUser(storedHash)
    for (const password of ['\0', '\0'.repeat(128), 'ä'.repeat(128)]) {
      t.strictSame(statusAndErrno(await api.logIn({ mobile, password })), [401, '4102'], storedHash)
    }
  }
})

t.test('a repeat of a sign-up or a reset that finds such a hash verifies it, too', async (t) => {
  const legacy = formerHashes['correct horse']?.[0] ?? ''
  for (const [storedHash, signUpReply, resetReply] of [
    [legacy, [201, '0'], [200, '0']],
    ['!', [409, '4003'], [422, '4004']]
  ] as const) {
    const passwords = { password: 'correct horse', password2: 'correct horse' }
    const signUp = await signUpBody(passwords)
    const { mobile } = signUp
    t.equal((await api.signUp(signUp)).statusCode, 201)
    await storeHash(mobile, storedHash)
    t.strictSame(statusAndErrno(await api.signUp(signUp)), signUpReply)
    const reset = await signUpBody({ mobile, ...passwords })
    t.equal((await api.resetPassword(reset)).statusCode, 200)
    await storeHash(mobile, storedHash)
    t.strictSame(statusAndErrno(await api.resetPassword(reset)), resetReply)
  }
})
