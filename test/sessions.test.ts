import { EventEmitter, once } from 'node:events'
import { readFileSync } from 'node:fs'
import { request } from 'node:http'
import { Signer } from '@fastify/cookie'
import t from 'tap'
import { nextEpoch } from '#src/users/users.js'
import { client, type Reply, type RequestOptions, statusAndErrno } from '../testkit/client.js'
import { leaseMsOf, sessionIdOf, sessionKeyOf, startTestbed } from '../testkit/testbed.js'
import { until } from '../testkit/until.js'

/*
 * Sessions: the cookie, what Redis has of them, and their end. G9: after a reset, or a logout everywhere, has been answered with
 * success, no session that began with an earlier proof lives.
 */

const { ageClaim, build, config, cookieOf, openProxy, postgres, redis, signUpBody, stores, userRows } =
  await startTestbed(t)

const app = await build(t)
const api = client(app)

// The proxies let everything pass until a test strikes.
const [redisProxy, postgresProxy] = [await openProxy(t, 'REDIS_URL'), await openProxy(t, 'DATABASE_URL')]
const proxiedApp = await build(t, { REDIS_URL: redisProxy.url, DATABASE_URL: postgresProxy.url })
const proxied = client(proxiedApp)

const everywhere = '?everywhere=true'
const sessionSecret = `${stores.environment.SESSION_SECRET}`

/** Signs a user up. Returns its body, its cookie, and a body that resets the password. */
async function registerUser() {
  const body = await signUpBody()
  const reply = await api.signUp(body)
  const { mobile, password } = body
  const reset = await signUpBody({ mobile })
  const { user_id: userId } = reply.json().data
  return { body, mobile, login: { mobile, password }, reset, userId, cookie: cookieOf(reply) }
}

const sessionStatus = async (cookie: string) => (await api.whoAmI(cookie)).statusCode
const isStored = async (cookie: string) => (await redis.exists(sessionKeyOf(cookie))) === 1
const countIndexed = (userId: string) => redis.zcard(`sessions_of:${userId}`)
const sessionCookiesOf = ({ cookies }: Reply) => cookies.filter(({ name }) => name.endsWith('sid'))

/** Holds a request of the proxied service that contains a text. */
function holdRequest(proxy: typeof redisProxy, needle: string) {
  const barrier = new EventEmitter()
  const arrived = proxy.strike(needle, { kind: 'hold', until: once(barrier, 'release') })
  return { arrived, release: () => barrier.emit('release') }
}

const weakest = { HASH_MEMORY_KIB: '7168', HASH_PASSES: '5' }
const production = { NODE_ENV: 'production', SMS: 'off', TRUST_PROXY: '127.0.0.1', ...weakest }
const secureApi = client(await build(t, production))
const newSecret = 'a newer secret of at least thirty-two characters'
const rotated = { ...production, COOKIE_SECURE: 'false', SESSION_SECRET: `${newSecret},${sessionSecret}` }
const rotatedApi = client(await build(t, rotated))

t.test('the cookie is HttpOnly, SameSite=Lax, lives for a day, and is __Host- and Secure if it can be', async (t) => {
  const plain = /^sid=[^;]+; Max-Age=86400; Path=\/; HttpOnly; SameSite=Lax$/
  const secure = /^__Host-sid=[^;]+; Max-Age=86400; Path=\/; HttpOnly; Secure; SameSite=Lax$/
  for (const [{ signUp }, expected] of [
    [api, plain],
    [secureApi, secure],
    [rotatedApi, plain]
  ] as const) {
    // Whatever the gateway says of its client.
    for (const proto of ['https', 'http']) {
      const reply = await signUp(await signUpBody(), { headers: { 'x-forwarded-proto': proto } })
      cookieOf(reply)
      const [session = '', device = ''] = [reply.headers['set-cookie']].flat().map(String)
      t.match(session, expected)
      t.match(device, expected === plain ? /^device=/ : /^__Host-device=[^;]+; .*; HttpOnly; Secure/)
      t.equal(sessionCookiesOf(reply).length, 1)
    }
  }
})

t.test('an invalid cookie is not logged in, and does not prevent a sign-up', async (t) => {
  const { cookie } = await registerUser()
  const [id = '', signature = ''] = cookie.slice('sid='.length).split('.')
  const ofOtherSecret = new Signer('another secret of at least thirty-two characters').sign(id)
  const unknown = new Signer(sessionSecret).sign('an-id-that-redis-does-not-have')
  const forged = [`${id}.${signature.slice(1)}`, `x${id}.${signature}`, id, ofOtherSecret, unknown]
  for (const value of [...forged, '..', '%E0%A4%A', '"', '\xff', 'x'.repeat(5_000)]) {
    t.strictSame(statusAndErrno(await api.whoAmI(`sid=${value}`)), [401, '4101'], value.slice(0, 20))
    const signedUp = await api.signUp(await signUpBody(), { headers: { cookie: `sid=${value}` } })
    t.strictSame([signedUp.statusCode, sessionCookiesOf(signedUp).length], [201, 1])
  }
})

t.test('only the user of a stored session counts, and without one nobody is logged in', async (t) => {
  const { cookie } = await registerUser()
  const bad = ['', 'garbage', 'null', '1', '[]', '{}', '{"user_id":"1"}', '{"cookie":7}']
  for (const value of [...bad, '{"user_id":null,"name":"n","mobile":"m"}', '{"user_id":{},"name":"n","mobile":"m"}']) {
    await redis.set(sessionKeyOf(cookie), value)
    t.strictSame(statusAndErrno(await api.whoAmI(cookie)), [401, '4101'], value)
  }
  for (const extra of ['"__proto__":{"user_id":"2"}', '"isModified":1,"destroy":1', '"cookie":{"expires":"never"}']) {
    await redis.set(sessionKeyOf(cookie), `{${extra},"user_id":"1","name":"n","mobile":"m"}`)
    const reply = await api.whoAmI(cookie)
    t.strictSame([reply.statusCode, reply.json().data], [200, { user_id: '1', name: 'n', mobile: 'm' }], extra)
  }
  t.strictSame([(await api.logOut(cookie)).statusCode, await isStored(cookie)], [200, false])
})

t.test('DELETE /session ends the session and clears the cookie, also when nobody is logged in', async (t) => {
  const cookie = cookieOf(await secureApi.signUp(await signUpBody()))
  for (const sent of [cookie, cookie, '', '__Host-sid=garbage']) {
    const reply = await secureApi.logOut(sent)
    t.equal(reply.statusCode, 200)
    // Browsers ignore a __Host- cookie without Secure, also when it clears.
    t.match(reply.cookies, [{ name: '__Host-sid', value: '', maxAge: 0, path: '/', secure: true }])
    t.equal(reply.cookies.length, 1)
  }
  t.strictSame([(await secureApi.whoAmI(cookie)).statusCode, await isStored(cookie)], [401, false])
})

t.test('what logs a user in starts a session and destroys that of its cookie; a refusal does neither', async (t) => {
  const { login, reset, mobile, cookie } = await registerUser()
  const refused = await api.signUp({ ...(await signUpBody()), sms_code: 'wrong' }, { headers: { cookie } })
  t.strictSame([refused.statusCode, refused.headers['set-cookie'], await sessionStatus(cookie)], [422, undefined, 200])
  let former = cookie
  for (const send of [
    (options: RequestOptions) => api.logIn(login, options),
    (options: RequestOptions) => api.resetPassword(reset, options),
    async (options: RequestOptions) => api.signUp(await signUpBody(), options)
  ]) {
    const reply = await send({ headers: { cookie: former } })
    const next = cookieOf(reply)
    t.equal(sessionCookiesOf(reply).length, 1)
    t.strictSame([await sessionStatus(next), await isStored(former)], [200, false])
    former = next
  }
  t.not((await api.whoAmI(former)).json().data.mobile, mobile)
  await redis.del(sessionKeyOf(former))
  const ended = await api.whoAmI(former)
  t.strictSame([ended.statusCode, ended.headers['set-cookie']], [401, undefined], 'for a session that has ended, too')
})

t.test('of several session cookies the one that verifies and is stored counts', async (t) => {
  const signUp = async (cookie = '') => cookieOf(await api.signUp(await signUpBody(), { headers: { cookie } }))
  const ended = await signUp()
  t.equal((await api.logOut(ended)).statusCode, 200)
  for (const headerWith of [
    (good: string) => `sid=bad; ${good}`,
    (good: string) => `${good}; sid=bad`,
    (good: string) => `sid=; sid; sid=%; sid=an-id-without-a-signature; ${good}`,
    (good: string) => `${good.slice(0, -1)}; sid=${good.slice(7)}; other=1; ${good};`,
    (good: string) => `sid="bad"; xsid=1; sid=a.b; sid=c.d;  ${good} ; sid=e`,
    (good: string) => `${ended}; ${good}`,
    (good: string) => `${good}; ${ended}; ${good}`,
    // Each costs a signature, so only twenty are looked at.
    (good: string) => `${'sid=a.b; '.repeat(19)}${good}`
  ]) {
    const good = await signUp()
    const header = headerWith(good)
    t.strictSame([await sessionStatus(header), await isStored(good)], [200, true], header)
    const next = await signUp(header)
    t.notOk(await isStored(good), 'a sign-up ends the former session')
    for (const [query, cookie] of [
      ['', next],
      [everywhere, await signUp()]
    ] as const) {
      const reply = await api.logOut(headerWith(cookie), query)
      t.strictSame([reply.statusCode, await isStored(cookie)], [200, false], 'a logout ends it')
      t.match(reply.cookies, [{ name: 'sid', value: '' }])
    }
  }
  t.equal(await sessionStatus(`${'sid=a.b; '.repeat(20)}${await signUp()}`), 401)
})

t.test('of several secrets the first signs, all verify, and no valid cookie is cleared', async (t) => {
  const { cookie: oldCookie } = await registerUser()
  const newCookie = cookieOf(await rotatedApi.signUp(await signUpBody()))
  for (const cookie of [oldCookie, newCookie]) {
    const reply = await rotatedApi.whoAmI(cookie)
    t.strictSame([reply.statusCode, reply.headers['set-cookie']], [200, undefined])
  }
  t.equal(await sessionStatus(newCookie), 401, 'the first secret has signed')
  t.strictSame([(await rotatedApi.logOut(oldCookie)).statusCode, await sessionStatus(oldCookie)], [200, 401])
})

t.test('a request target in absolute form keeps its session', async (t) => {
  const { cookie } = await registerUser()
  const url = new URL(await app.listen({ port: 0, host: '127.0.0.1' }))
  // Over a socket: `inject` makes every target relative.
  for (const origin of ['', 'http://gateway.internal', 'HTTPS://gateway.internal:8443']) {
    const sent = request(url, { path: `${origin}/api/v1.0/session`, headers: { cookie }, agent: false }).end()
    const [response] = await once(sent, 'response')
    t.equal(response.resume().statusCode, 200, origin)
  }
})

t.test('a user has at most 100 sessions: one more ends the oldest, and the expired do not count', async (t) => {
  const { login, userId, cookie } = await registerUser()
  const index = `sessions_of:${userId}`
  const now = Math.floor(Date.now() / 1_000)
  await redis.zadd(index, ...Array.from({ length: 98 }, (_, n) => [now + 1_000 + n, `earlier-${n}`]).flat())
  await redis.zadd(index, now - 1, 'expired')
  await redis.mset('session:earlier-0', '{}', 'session:earlier-1', '{}')
  const stored = () => redis.mget('session:earlier-0', 'session:earlier-1')
  cookieOf(await api.logIn(login))
  t.strictSame([await redis.zcard(index), await stored()], [100, ['{}', '{}']])
  t.equal((await api.logIn(login)).statusCode, 201)
  t.strictSame([await redis.zcard(index), await stored()], [100, [null, '{}']])
  t.equal(await sessionStatus(cookie), 200)
  t.equal((await api.logIn(login, { headers: { cookie } })).statusCode, 201)
  t.equal(await redis.zscore(index, sessionIdOf(cookie)), null, 'a session that is replaced leaves the index')
  const ttlSeconds = await redis.ttl(index)
  t.ok(ttlSeconds > 86_300 && ttlSeconds <= 86_400, 'the index lives as long as its last session')
})

t.test('DELETE /session?everywhere=true ends all sessions of the user and no others', async (t) => {
  const [user, other] = [await registerUser(), await registerUser()]
  const [second, third] = [cookieOf(await api.logIn(user.login)), cookieOf(await api.logIn(user.login))]
  for (const query of ['?everywhere=maybe', `${everywhere}&everywhere=true`]) {
    t.strictSame(statusAndErrno(await api.logOut(user.cookie, query)), [400, '4103'], query)
  }
  t.equal((await api.logOut('', everywhere)).statusCode, 200, 'without a session nothing ends')
  t.equal((await api.logOut(third, '?everywhere=false')).statusCode, 200)
  t.strictSame([await sessionStatus(user.cookie), await sessionStatus(third)], [200, 401], 'only one session ends')
  t.equal((await api.logOut(second, everywhere)).statusCode, 200)
  for (const cookie of [user.cookie, second]) t.notOk(await isStored(cookie))
  t.equal(await countIndexed(user.userId), 0)
  t.equal(await sessionStatus(other.cookie), 200)
  const last = cookieOf(await api.logIn(user.login))
  await postgres.query('DELETE FROM users WHERE mobile = $1', [user.mobile])
  t.equal((await api.logOut(last, everywhere)).statusCode, 200)
  t.equal(await sessionStatus(last), 401, 'also of a deleted user')
})

/** What happens between the next verification of a password by the proxied service and the use of its result. */
let interruption: (() => Promise<unknown>) | undefined
const { verify } = proxiedApp.mobileSignup.passwords
proxiedApp.mobileSignup.passwords.verify = async (...args) => {
  const matches = await verify(...args)
  const interrupt = interruption
  interruption = undefined
  await interrupt?.()
  return matches
}

t.test('G9: a login, and a retry of a sign-up, that are in flight when all sessions end, start none', async (t) => {
  for (const end of ['reset', 'logout everywhere'] as const) {
    for (const inFlight of ['login', 'sign-up'] as const) {
      const { body, login, reset, cookie, userId } = await registerUser()
      interruption = async () => {
        const reply = await (end === 'reset' ? api.resetPassword(reset) : api.logOut(cookie, everywhere))
        t.equal(reply.statusCode, 200)
      }
      const reply = await (inFlight === 'login' ? proxied.logIn(login) : proxied.signUp(body))
      t.equal(interruption, undefined)
      if (inFlight === 'login') t.strictSame(statusAndErrno(reply), [401, '4102'], end)
      else t.strictSame([reply.statusCode, reply.json().data.session], [201, false], end)
      t.equal(reply.headers['set-cookie'], undefined)
      t.equal(await countIndexed(userId), end === 'reset' ? 1 : 0, 'only the session of the reset is left')
      const password = end === 'reset' ? reset.password : login.password
      t.equal((await api.logIn({ ...login, password })).statusCode, 201, 'a later login is not refused')
    }
  }
})

t.test('G9: a sign-up whose session is stored after a reset of the same user has no session', async (t) => {
  const body = await signUpBody()
  const storing = holdRequest(redisProxy, '"epoch":0')
  const signUp = proxied.signUp(body)
  await storing.arrived
  t.equal((await api.resetPassword(await signUpBody({ mobile: body.mobile }))).statusCode, 200)
  storing.release()
  const reply = await signUp
  const { session, user_id } = reply.json().data
  t.strictSame([reply.statusCode, session, reply.headers['set-cookie']], [201, false, undefined])
  t.equal(await countIndexed(user_id), 1, 'only the session of the reset is left')
})

t.test('G9: a session that is in no index, or that another service has stored, does not outlive its end', async (t) => {
  for (const end of ['reset', 'logout everywhere'] as const) {
    const { reset, userId, cookie, login, mobile } = await registerUser()
    const [second, foreign] = [cookieOf(await api.logIn(login)), cookieOf(await api.logIn(login))]
    await redis.set(sessionKeyOf(foreign), JSON.stringify({ user_id: userId, name: mobile, mobile }))
    t.equal(await sessionStatus(foreign), 200)
    await redis.zrem(`sessions_of:${userId}`, sessionIdOf(cookie), sessionIdOf(foreign))
    const reply = await (end === 'reset' ? api.resetPassword(reset) : api.logOut(second, everywhere))
    t.equal(reply.statusCode, 200)
    t.ok(await isStored(cookie), 'the session is still in Redis')
    t.strictSame([await sessionStatus(cookie), await sessionStatus(foreign)], [401, 401], end)
    t.notOk(await isStored(second), 'other services do not find those in the index')
  }
})

t.test('G9: of two resets that end in another order than they began, the later password has the session', async (t) => {
  const { mobile, reset } = await registerUser()
  // The first reset has written its password, and has not yet ended the sessions.
  const ending = holdRequest(redisProxy, '}:epoch')
  const firstReply = proxied.resetPassword(reset)
  await ending.arrived
  const second = await signUpBody({ mobile })
  const secondReply = await api.resetPassword(second)
  t.equal(secondReply.statusCode, 200)
  ending.release()
  const first = await firstReply
  t.strictSame([first.statusCode, first.json().data.session], [200, false], 'the first has no session')
  t.equal(await sessionStatus(cookieOf(secondReply)), 200, 'the second keeps its own')
  const epochTtlSeconds = await redis.ttl(`{sessions_of:${first.json().data.user_id}}:epoch`)
  t.ok(epochTtlSeconds > 172_700 && epochTtlSeconds <= 172_800, 'an epoch is known for longer than a session lives')
  t.equal((await api.logIn({ mobile, password: second.password })).statusCode, 201)
})

t.test('G9: a logout or a reset that cannot end the sessions is no success, and a retry is', async (t) => {
  const { reset, login, cookie } = await registerUser()
  // The first request with the key reads the session.
  redisProxy.strike(sessionKeyOf(cookie), { kind: 'reset' }, 1)
  t.strictSame(statusAndErrno(await proxied.logOut(cookie)), [503, '4001'])
  postgresProxy.strike('begin_session_epoch', { kind: 'reset' })
  await until('Redis is used again', async () => (await proxied.whoAmI(cookie)).statusCode === 200)
  t.strictSame(statusAndErrno(await proxied.logOut(cookie, everywhere)), [503, '4001'])
  t.equal(await sessionStatus(cookie), 200)

  redisProxy.strike('}:epoch', { kind: 'reset' })
  t.strictSame(statusAndErrno(await proxied.resetPassword(reset)), [503, '4001'])
  await ageClaim(reset.mobile, leaseMsOf(config()))
  t.equal((await api.resetPassword(reset)).statusCode, 200, 'the same request again')
  t.equal(await sessionStatus(cookie), 401)

  // The answer of Redis to a logout everywhere is lost.
  const newLogin = { ...login, password: reset.password }
  const [first, second] = [cookieOf(await api.logIn(newLogin)), cookieOf(await api.logIn(newLogin))]
  await until('Redis is used again', async () => (await proxied.whoAmI(second)).statusCode === 200)
  redisProxy.strike('}:epoch', { kind: 'cut', bytes: 1 }, 1)
  t.strictSame(statusAndErrno(await proxied.logOut(second, everywhere)), [503, '4001'])
  t.equal(await sessionStatus(first), 401, 'the epoch has ended')
  const later = cookieOf(await api.logIn(newLogin))
  t.equal((await api.logOut(second, everywhere)).statusCode, 200)
  t.strictSame([await isStored(first), await isStored(second)], [false, false], 'no other service finds them')
  t.equal(await sessionStatus(later), 200, 'an outdated session cannot end newer ones')
})

t.test('G9: a logout everywhere that could not destroy another session destroys it when it is retried', async (t) => {
  const { login, cookie } = await registerUser()
  const other = cookieOf(await api.logIn(login))
  // A user of Redis that may destroy only the session of the logout.
  const rights = ['on', '>password', '~*', '&*', '+@all', '-del', `(+del ~${sessionKeyOf(cookie)})`]
  await redis.acl('SETUSER', 'limited', ...rights)
  const url = Object.assign(new URL(stores.redisUrl), { username: 'limited', password: 'password' })
  const limited = client(await build(t, { REDIS_URL: url.href }))
  t.strictSame([(await limited.logOut(cookie, everywhere)).statusCode, await isStored(other)], [500, true])
  await redis.acl('SETUSER', 'limited', '+del')
  t.equal((await limited.logOut(cookie, everywhere)).statusCode, 200)
  t.strictSame([await isStored(other), await isStored(cookie)], [false, false])
})

t.test('G9: all sessions end also if Postgres has lost their epoch in a failover', async (t) => {
  const users = []
  for (const end of ['reset', 'logout everywhere'] as const) {
    const { mobile, login, reset } = await registerUser()
    const [{ password_hash }] = await userRows(mobile)
    const cookie = cookieOf(await api.resetPassword(reset))
    const other = cookieOf(await api.logIn({ mobile, password: reset.password }))
    await postgres.query('UPDATE users SET session_epoch = 0 WHERE mobile = $1', [mobile])
    users.push({ end, mobile, login, cookie, other, formerHash: password_hash })
  }
  // A failover takes longer than the second that two epochs need to differ.
  const second = Math.floor(Date.now() / 1_000)
  await until('the next second begins', () => Math.floor(Date.now() / 1_000) > second)
  for (const { end, mobile, login, cookie, other, formerHash } of users) {
    const reply =
      end === 'reset' ? await api.resetPassword(await signUpBody({ mobile })) : await api.logOut(cookie, everywhere)
    t.equal(reply.statusCode, 200)
    if (end === 'reset') t.ok(reply.json().data.session)
    t.equal(await sessionStatus(other), 401, end)
    const lost = 'UPDATE users SET session_epoch = 0, password_hash = $2 WHERE mobile = $1'
    await postgres.query(lost, [mobile, formerHash])
    t.equal((await api.logIn(login)).statusCode, 401)
  }
})

/** The commands in docs/operating.md, from its fenced blocks. */
const operating = readFileSync(new URL('../docs/operating.md', import.meta.url), 'utf8')
const fenced = [...operating.matchAll(/^ *```\w*\n([\s\S]*?)^ *```$/gm)].map(([, block]) => block).join('')
const commandIn = (pattern: RegExp) => {
  const [, command] = pattern.exec(fenced) ?? []
  if (command === undefined) throw new Error(`no block of docs/operating.md has ${pattern}`)
  return command
}
const operatorUpdate = () => commandIn(/^ *(UPDATE users SET session_epoch[^;]*;)/m)
const operatorDelete = () => commandIn(/^ *(DELETE FROM users[^;]*;)/m)

/** Ends the sessions of a user as docs/operating.md tells operators to do. */
async function endAsOperator(statement: string, mobile: string): Promise<void> {
  const { rows } = await postgres.query(statement.replace('13812345678', mobile))
  const run = (name: string, sessionId = '') => {
    const line = commandIn(new RegExp(`^ *${name} (.*)$`, 'm'))
    const filled = line.replace('EPOCH', rows[0].epoch).replace('ID', rows[0].id).replace('SESSION', sessionId)
    const args = [...filled.matchAll(/"([^"]*)"|(\S+)/g)].map(([, quoted, word]) => quoted ?? word ?? '')
    return redis.call(name, ...args)
  }
  await run('EVAL')
  for (const sessionId of [await run('ZRANGE')].flat()) await run('DEL', `${sessionId}`)
}

t.test('G9: an operator ends all sessions of a user with the statements of docs/operating.md', async (t) => {
  for (const statement of [operatorUpdate(), operatorDelete()]) {
    const [{ login, cookie, userId, mobile }, other] = [await registerUser(), await registerUser()]
    const foreign = cookieOf(await api.logIn(login))
    await redis.set(sessionKeyOf(foreign), JSON.stringify({ user_id: userId, name: mobile, mobile }))
    interruption = () => endAsOperator(statement, mobile)
    const inFlight = await proxied.logIn(login)
    t.strictSame(statusAndErrno(inFlight), [401, '4102'], 'a login that has verified the password before')
    for (const ended of [cookie, foreign]) {
      t.strictSame([await sessionStatus(ended), await isStored(ended)], [401, false], statement)
    }
    t.equal(await sessionStatus(other.cookie), 200, 'the sessions of others live')
    const isThere = statement === operatorUpdate()
    t.equal((await userRows(mobile)).length, isThere ? 1 : 0)
    const later = isThere ? await api.logIn(login) : await api.signUp(await signUpBody({ mobile }))
    t.equal(await sessionStatus(cookieOf(later)), 200, 'a later login, or sign-up')
  }
})

t.test('G9: an epoch is greater than the former one in every year that an integer can hold', async (t) => {
  const ofOperators = /SET session_epoch = (.*)$/im.exec(operatorUpdate())?.[1]
  for (const now of ['2024-01-01', '2038-01-19T03:14:07', '2038-01-19T03:14:08', '2092-01-19T03:14:06']) {
    const seconds = (Date.parse(`${now.padEnd(19, 'T00:00:00')}Z`) - Date.UTC(2024)) / 1_000
    for (const expression of [nextEpoch, `${ofOperators}`]) {
      const at = expression.replace('now()', `timestamptz '${now} UTC'`)
      const formerEpochs = `(VALUES (-1), (${seconds})) AS users (session_epoch)`
      const { rows } = await postgres.query(`SELECT ${at} AS epoch FROM ${formerEpochs}`)
      t.strictSame(rows, [{ epoch: seconds }, { epoch: seconds + 1 }], now)
    }
  }
})
