import { Redis } from 'ioredis'
import t from 'tap'
import { client } from '../testkit/client.js'
import { queryOnce } from '../testkit/postgres-admin.js'
import { refusedObjects } from '../testkit/rights.js'
import { accept, answerWith, startWebhook } from '../testkit/sms-webhook.js'
import { startTestbed } from '../testkit/testbed.js'
import { withDocumentedRights } from '../testkit/topologies.js'
import { until } from '../testkit/until.js'

/*
 * The rights in docs/operating.md. Other files run with them, too: `TESTBED_STORES=rights npx tap test/races.test.ts`.
 */

const { build, buildWithLog, cookieOf, issueCode, newMobile, postgres, redis, signUpBody, stores } =
  await startTestbed(t)

const rights = await withDocumentedRights(stores)
const { DATABASE_URL, REDIS_URL } = rights

t.test(
  'the rights suffice for every route, for events, a failed message and a sign-up that starts again',
  async (t) => {
    const webhook = await startWebhook(t)
    const env = { ...rights, SMS_WEBHOOK_URL: webhook.url, EVENTS_WEBHOOK_URL: webhook.url }
    const { app, lines } = await buildWithLog(t, env)
    t.strictSame((await app.inject('/health/ready')).json().data.failing, [])
    const api = client(app)
    const mobile = newMobile()
    webhook.answer = answerWith(404)
    t.equal((await api.sendCode(mobile)).statusCode, 503)
    webhook.answer = accept
    for (const expected of [202, 429]) t.equal((await api.sendCode(mobile)).statusCode, expected)

    const body = {
      ...(await signUpBody({ mobile: newMobile() })),
      mobile,
      sms_code: await redis.get(`sms_code_${mobile}`)
    }
    t.equal((await api.signUp({ ...body, sms_code: '000000' })).statusCode, 422)
    t.equal((await api.signUp(body)).statusCode, 201)
    t.equal((await api.signUp(body)).headers['idempotent-replayed'], 'true')
    await postgres.query('DELETE FROM users WHERE mobile = $1', [mobile])
    const signedUp = await api.signUp(body)
    t.strictSame([signedUp.statusCode, signedUp.headers['idempotent-replayed']], [201, undefined])
    t.equal((await api.signUp(await signUpBody({ mobile }))).statusCode, 409)

    const login = { mobile, password: body.password }
    t.equal((await api.logIn({ ...login, password: 'wrong' })).statusCode, 401)
    // It replaces an outdated hash.
    t.equal((await client(await build(t, { ...rights, HASH_PASSES: '2' })).logIn(login)).statusCode, 201)
    const cookie = cookieOf(await api.logIn(login))
    t.equal((await api.whoAmI(cookie)).statusCode, 200)
    t.equal((await api.logOut(cookie, '?everywhere=true')).statusCode, 200)
    const reset = await api.resetPassword(await signUpBody({ mobile }))
    t.equal(reset.statusCode, 200)
    t.equal((await api.logOut(cookieOf(reset))).statusCode, 200)
    t.equal((await api.logIn({ mobile, sms_code: await issueCode(mobile) })).statusCode, 201)
    t.equal((await api.deleteAccount({ mobile, sms_code: await issueCode(mobile) })).statusCode, 200)
    await until('all events are delivered', async () => {
      return (await postgres.query('SELECT FROM user_events')).rowCount === 0
    })

    const called = new Set(lines.map(({ method, route }) => `${method} ${route}`))
    const described = Object.entries(app.swagger().paths ?? {}).flatMap(([path, operations]) =>
      Object.keys(operations ?? {}).map((method) => `${method.toUpperCase()} ${path}`)
    )
    const uncalled = described.filter((route) => !route.includes('/health/') && !called.has(route))
    t.strictSame(uncalled, [], 'every route was called')
    t.strictSame(await refusedObjects(redis), [])
  }
)

t.test('the role in Postgres can change nothing else', async (t) => {
  for (const statement of [
    'TRUNCATE users',
    'DROP TABLE users',
    'ALTER TABLE users ADD more integer',
    'CREATE TABLE more (n integer)',
    "UPDATE users SET mobile = ''",
    'UPDATE users SET id = 1',
    "INSERT INTO users (id, name, mobile, password_hash) VALUES (1, '', '', '')",
    'SELECT created_at FROM users',
    'SELECT * FROM mobile_signup_migrations',
    'SELECT rolpassword FROM pg_authid'
  ]) {
    await t.rejects(queryOnce(DATABASE_URL, statement), { code: '42501' }, statement)
  }
})

t.test('the user in Redis can neither administer the server nor use other keys', async (t) => {
  const service = new Redis(REDIS_URL)
  t.teardown(() => service.disconnect())
  await redis.set('other', '')
  const others = ['FLUSHALL', 'KEYS *', 'SCAN 0', 'CONFIG GET *', 'ACL LIST', 'CLIENT LIST', 'SCRIPT FLUSH']
  for (const [command = '', ...args] of [
    ...[...others, 'PUBLISH channel text', 'GET other', 'SET other 1'].map((text) => text.split(' ')),
    ['EVAL', "return redis.call('GET', KEYS[1])", '1', 'other'],
    ['EVAL', "return redis.call('RENAME', KEYS[1], KEYS[1])", '1', 'sms_codes:all']
  ]) {
    const about = [command, ...args].join(' ')
    await t.rejects(service.call(command, ...args), /NOPERM|ACL failure|can't run this command/i, about)
  }
  const refused = await refusedObjects(redis)
  for (const object of ['flushall', 'other', 'rename']) t.ok(refused.includes(object), `the log of Redis has ${object}`)
})
