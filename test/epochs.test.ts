import { EventEmitter, once } from 'node:events'
import { readFileSync } from 'node:fs'
import { setImmediate } from 'node:timers/promises'
import t, { type Test } from 'tap'
import { nextEpoch } from '#src/users/users.js'
import { client, type Reply, statusAndErrno } from '../testkit/client.js'
import { leaseMsOf, sessionIdOf, sessionKeyOf, startTestbed } from '../testkit/testbed.js'
import { until } from '../testkit/until.js'

/*
 * G9: after a reset, or a logout everywhere, has been answered with success, no session that began with an earlier proof
 * lives.
 */

const testbed = await startTestbed(t)
const { ageClaim, build, config, cookieOf, issueCode, openProxy, postgres, redis, signUpBody, stores, userRows } =
  testbed

const app = await build(t)
const api = client(app)

/** Signs a user up. Returns its body, its cookie, and a body that resets the password. */
async function registerUser() {
  const body = await signUpBody()
  const reply = await api.signUp(body)
  const reset = await signUpBody({ mobile: body.mobile })
  return { body, reset, userId: reply.json().data.user_id, cookie: cookieOf(reply) }
}

const sessionStatus = async (cookie: string) => (await api.whoAmI(cookie)).statusCode

/** Builds a service that calls a function after each verification of a password, before it uses the result. */
async function buildInterrupted(t: Test, afterVerification: () => Promise<unknown>) {
  const app = await build(t)
  const { verify } = app.mobileSignup.passwords
  app.mobileSignup.passwords.verify = async (...args) => {
    const matches = await verify(...args)
    await afterVerification()
    return matches
  }
  return app
}

t.test('G9: a login whose password is reset meanwhile is refused, and leaves no session', async (t) => {
  const { body, reset, userId } = await registerUser()
  let resetReply: Reply | undefined
  const app = await buildInterrupted(t, async () => {
    resetReply ??= await api.resetPassword(reset)
  })
  const login = await client(app).logIn({ mobile: body.mobile, password: body.password })
  t.equal(resetReply?.statusCode, 200)
  t.strictSame(statusAndErrno(login), [401, '4102'])
  t.equal(login.headers['set-cookie'], undefined)
  t.equal(await redis.zcard(`sessions_of:${userId}`), 1, 'only the session of the reset is left')
})

t.test('shutdown waits for a logout everywhere whose client has disconnected', async (t) => {
  const { cookie } = await registerUser()
  const proxy = await openProxy(t, 'DATABASE_URL')
  const app = await build(t, { DATABASE_URL: proxy.url })
  const barrier = new EventEmitter()
  const held = proxy.strike('begin_session_epoch', { kind: 'hold', until: once(barrier, 'release') })
  const disconnection = new AbortController()
  const url = `${await app.listen({ port: 0, host: '127.0.0.1' })}/api/v1.0/session?everywhere=true`
  const logOut = fetch(url, { method: 'DELETE', headers: { cookie }, signal: disconnection.signal })
  await held
  disconnection.abort()
  await t.rejects(logOut, { name: 'AbortError' })
  const serverClosed = once(app.server, 'close')
  const closed = app.close()
  await serverClosed
  await setImmediate()
  barrier.emit('release')
  await closed
  t.equal(await redis.exists(sessionKeyOf(cookie)), 0)
})

t.test('G9: a login during a logout everywhere is refused', async (t) => {
  const { body, cookie, userId } = await registerUser()
  const app = await buildInterrupted(t, () => api.logOut(cookie, '?everywhere=true'))
  const { mobile, password } = body
  t.strictSame(statusAndErrno(await client(app).logIn({ mobile, password })), [401, '4102'])
  t.equal(await redis.zcard(`sessions_of:${userId}`), 0)
  t.equal((await api.logIn({ mobile, password })).statusCode, 201, 'and a later one is not')
})

t.test('G9: a replay during a reset starts no session', async (t) => {
  const { body, reset } = await registerUser()
  const app = await buildInterrupted(t, () => api.resetPassword(reset))
  const replay = await client(app).signUp(body)
  // The replay has verified the former password before the reset replaced it.
  t.strictSame([replay.statusCode, replay.json().data.session], [201, false])
  t.equal(replay.headers['set-cookie'], undefined)
})

t.test('G9: a sign-up whose session is stored after a reset of the same user has no session', async (t) => {
  const proxy = await openProxy(t, 'REDIS_URL')
  const slow = client(await build(t, { REDIS_URL: proxy.url }))
  const body = await signUpBody()
  const barrier = new EventEmitter()
  const reachedSession = proxy.strike('"epoch":0', { kind: 'hold', until: once(barrier, 'open') })
  const signUp = slow.signUp(body)
  await reachedSession
  const code = await issueCode(body.mobile)
  const reset = { ...body, sms_code: code, password: 'a newer password', password2: 'a newer password' }
  t.equal((await api.resetPassword(reset)).statusCode, 200)
  barrier.emit('open')
  const reply = await signUp
  t.strictSame([reply.statusCode, reply.json().data.session], [201, false])
  t.equal(reply.headers['set-cookie'], undefined)
  t.equal(await redis.zcard(`sessions_of:${reply.json().data.user_id}`), 1, 'only the session of the reset is left')
})

t.test('G9: a session that could not be deleted, or is in no index, does not outlive a reset', async (t) => {
  for (const end of ['reset', 'logout everywhere'] as const) {
    const { reset, userId, cookie, body } = await registerUser()
    const { mobile, password } = body
    const second = cookieOf(await api.logIn({ mobile, password }))
    const stored = await redis.get(sessionKeyOf(cookie))
    await redis.zrem(`sessions_of:${userId}`, sessionIdOf(cookie))
    if (end === 'reset') t.equal((await api.resetPassword(reset)).statusCode, 200)
    else t.equal((await api.logOut(second, '?everywhere=true')).statusCode, 200)
    t.equal(await redis.get(sessionKeyOf(cookie)), stored, 'the session is still in Redis')
    t.equal(await sessionStatus(cookie), 401, end)
    t.equal(await redis.exists(sessionKeyOf(second)), 0, 'other services do not find those in the index')
  }
})

t.test('G9: of two resets that end in another order than they began, the later password has the session', async (t) => {
  const { body, reset } = await registerUser()
  const proxy = await openProxy(t, 'REDIS_URL')
  const slow = client(await build(t, { REDIS_URL: proxy.url }))
  // The first reset has written its password, and has not yet ended the sessions.
  const barrier = new EventEmitter()
  const reachedEnd = proxy.strike('}:epoch', { kind: 'hold', until: once(barrier, 'open') })
  const firstReply = slow.resetPassword(reset)
  await reachedEnd
  const second = await signUpBody({ mobile: body.mobile })
  const secondReply = await api.resetPassword(second)
  t.equal(secondReply.statusCode, 200)
  barrier.emit('open')
  const first = await firstReply
  t.strictSame([first.statusCode, first.json().data.session], [200, false], 'the first has no session')
  t.equal(await sessionStatus(cookieOf(secondReply)), 200, 'the second keeps its own')
  const [{ id, session_epoch }] = await userRows(body.mobile)
  t.equal(await redis.get(`{sessions_of:${id}}:epoch`), `${session_epoch}`, 'the later epoch stands')
  const { mobile, password } = second
  t.equal((await api.logIn({ mobile, password })).statusCode, 201)
})

t.test('503: a reset or a logout everywhere that cannot end the sessions is no success, and a retry is', async (t) => {
  const { reset, cookie, body } = await registerUser()
  const proxy = await openProxy(t, 'REDIS_URL')
  const failing = client(await build(t, { REDIS_URL: proxy.url }))
  proxy.strike('}:epoch', { kind: 'reset' })
  t.strictSame(statusAndErrno(await failing.resetPassword(reset)), [503, '4001'])
  await ageClaim(reset.mobile, leaseMsOf(config()))
  t.equal((await api.resetPassword(reset)).statusCode, 200, 'the same request again')
  t.equal(await sessionStatus(cookie), 401)

  const laterCookie = cookieOf(await api.logIn({ mobile: body.mobile, password: reset.password }))
  const postgresProxy = await openProxy(t, 'DATABASE_URL')
  const withoutPostgres = client(await build(t, { DATABASE_URL: postgresProxy.url }))
  postgresProxy.strike('begin_session_epoch', { kind: 'reset' })
  t.strictSame(statusAndErrno(await withoutPostgres.logOut(laterCookie, '?everywhere=true')), [503, '4001'])
  t.equal(await sessionStatus(laterCookie), 200)
})

t.test('a logout everywhere whose answer from Redis is lost is completed by its retry', async (t) => {
  const { body, cookie } = await registerUser()
  const { mobile, password } = body
  const second = cookieOf(await api.logIn({ mobile, password }))
  const proxy = await openProxy(t, 'REDIS_URL')
  const failing = client(await build(t, { REDIS_URL: proxy.url }))
  // The first request with the key reads the epoch of the session.
  proxy.strike('}:epoch', { kind: 'cut', bytes: 1 }, 1)
  t.strictSame(statusAndErrno(await failing.logOut(second, '?everywhere=true')), [503, '4001'])
  t.equal(await sessionStatus(cookie), 401, 'the epoch has ended')
  const later = cookieOf(await api.logIn({ mobile, password }))
  t.equal((await api.logOut(second, '?everywhere=true')).statusCode, 200)
  const keys = [cookie, second].map(sessionKeyOf)
  t.equal(await redis.exists(keys), 0, 'no other service finds a session')
  t.equal(await sessionStatus(later), 200, 'an outdated session cannot end newer ones')
})

t.test('G9: a logout everywhere that could not destroy another session destroys it when it is retried', async (t) => {
  const { body, cookie } = await registerUser()
  const { mobile, password } = body
  const other = cookieOf(await api.logIn({ mobile, password }))
  // A user of Redis that may destroy only the session of the logout.
  const rights = ['on', '>password', '~*', '&*', '+@all', '-del', `(+del ~${sessionKeyOf(cookie)})`]
  await redis.acl('SETUSER', 'limited', ...rights)
  const url = Object.assign(new URL(stores.redisUrl), { username: 'limited', password: 'password' })
  const app = client(await build(t, { REDIS_URL: url.href }))
  t.equal((await app.logOut(cookie, '?everywhere=true')).statusCode, 500)
  t.equal(await redis.exists(sessionKeyOf(other)), 1)
  await redis.acl('SETUSER', 'limited', '+del')
  t.equal((await app.logOut(cookie, '?everywhere=true')).statusCode, 200)
  t.equal(await redis.exists(sessionKeyOf(other), sessionKeyOf(cookie)), 0)
})

t.test('a logout everywhere of a deleted user ends its sessions', async (t) => {
  const { body, cookie } = await registerUser()
  const { mobile, password } = body
  const second = cookieOf(await api.logIn({ mobile, password }))
  await postgres.query('DELETE FROM users WHERE mobile = $1', [mobile])
  t.equal((await api.logOut(second, '?everywhere=true')).statusCode, 200)
  t.strictSame([await sessionStatus(cookie), await sessionStatus(second)], [401, 401])
})

const operating = readFileSync(new URL('../docs/operating.md', import.meta.url), 'utf8')
const [, recipe = ''] = /^## Ending sessions and deleting users\n([\s\S]*?)^## /m.exec(operating) ?? []

/** Ends the sessions of a user as docs/operating.md tells operators to do. */
async function endAsOperator(statement: 'UPDATE' | 'DELETE', mobile: string): Promise<void> {
  const [sql = ''] = new RegExp(`^ +${statement} [^;]*;`, 'm').exec(recipe) ?? []
  const { rows } = await postgres.query(sql.replace('13812345678', mobile))
  const run = (command: string, sessionId = '') => {
    const [line = ''] = new RegExp(`^ +${command} .*$`, 'm').exec(recipe) ?? []
    const filled = line.replace('EPOCH', rows[0].epoch).replace('ID', rows[0].id).replace('SESSION', sessionId)
    const [name = '', ...args] = [...filled.matchAll(/"([^"]*)"|(\S+)/g)].map(
      ([, quoted, word]) => quoted ?? word ?? ''
    )
    return redis.call(name, ...args)
  }
  await run('EVAL')
  const sessionIds = await run('ZRANGE')
  if (!Array.isArray(sessionIds)) throw new Error('ZRANGE returned no list')
  for (const sessionId of sessionIds) await run('DEL', `${sessionId}`)
}

for (const statement of ['UPDATE', 'DELETE'] as const) {
  t.test(`an operator ends all sessions of a user with the ${statement} of docs/operating.md`, async (t) => {
    const [{ body, cookie, userId }, other] = [await registerUser(), await registerUser()]
    const { mobile, password } = body
    const foreign = cookieOf(await api.logIn({ mobile, password }))
    await redis.set(sessionKeyOf(foreign), JSON.stringify({ user_id: userId, name: mobile, mobile }))
    let isDone = false
    const app = await buildInterrupted(t, async () => {
      if (!isDone) await endAsOperator(statement, mobile)
      isDone = true
    })
    const inFlight = await client(app).logIn({ mobile, password })
    t.strictSame(statusAndErrno(inFlight), [401, '4102'], 'a login that has verified the password before')
    for (const ended of [cookie, foreign]) {
      t.equal(await sessionStatus(ended), 401)
      t.equal(await redis.exists(sessionKeyOf(ended)), 0, 'other services do not find it')
    }
    t.equal(await sessionStatus(other.cookie), 200, 'the sessions of others live')

    if (statement === 'UPDATE') {
      t.equal(await sessionStatus(cookieOf(await api.logIn({ mobile, password }))), 200, 'a later login')
    } else {
      t.strictSame(await userRows(mobile), [])
      const laterSignUp = await api.signUp(await signUpBody({ mobile }))
      t.equal(await sessionStatus(cookieOf(laterSignUp)), 200, 'a later sign-up of the mobile')
    }
  })
}

t.test('a new session epoch is greater than the former one in every year that an integer can hold', async (t) => {
  const ofManual = /session_epoch = (greatest\(.*\))$/im.exec(recipe)?.[1]
  const years = [
    '2024-01-01',
    '2026-07-01',
    '2038-01-19T03:14:07',
    '2038-01-19T03:14:08',
    '2060-02-29',
    '2092-01-19T03:14:06'
  ]
  for (const now of years) {
    const seconds = (Date.parse(`${now.padEnd(19, 'T00:00:00')}Z`) - Date.UTC(2024)) / 1_000
    for (const expression of [nextEpoch, `${ofManual}`]) {
      const epochAfter = async (former: number) => {
        const at = expression.replace('now()', `timestamptz '${now} UTC'`)
        const { rows } = await postgres.query(
          `SELECT ${at} AS epoch FROM (VALUES (${former})) AS users (session_epoch)`
        )
        return rows[0].epoch
      }
      t.equal(await epochAfter(-1), seconds, now)
      t.equal(await epochAfter(seconds), seconds + 1, now)
    }
  }
})

t.test('a session of another service, without an epoch, lives until the first reset', async (t) => {
  const { body, reset, userId, cookie } = await registerUser()
  const { mobile } = body
  await redis.set(sessionKeyOf(cookie), JSON.stringify({ user_id: userId, name: mobile, mobile }))
  t.equal(await sessionStatus(cookie), 200)
  await redis.del(`sessions_of:${userId}`)
  t.equal((await api.resetPassword(reset)).statusCode, 200)
  t.equal(await sessionStatus(cookie), 401)
})

for (const end of ['reset', 'logout everywhere'] as const) {
  t.test(`a ${end} ends all sessions, also if Postgres has lost the epoch with which they began`, async (t) => {
    const { body, reset, userId } = await registerUser()
    const cookie = cookieOf(await api.resetPassword(reset))
    const other = cookieOf(await api.logIn({ mobile: body.mobile, password: reset.password }))
    t.equal(await sessionStatus(other), 200)
    await postgres.query('UPDATE users SET session_epoch = 0 WHERE id = $1', [userId])
    // A failover takes longer than the second that two epochs need to differ.
    const second = Math.floor(Date.now() / 1_000)
    await until('the next second begins', () => Math.floor(Date.now() / 1_000) > second)

    if (end === 'logout everywhere') t.equal((await api.logOut(cookie, '?everywhere=true')).statusCode, 200)
    else {
      const laterReset = await api.resetPassword(await signUpBody({ mobile: body.mobile }))
      t.strictSame([laterReset.statusCode, laterReset.json().data.session], [200, true])
    }
    t.equal(await sessionStatus(other), 401)
  })
}

t.test('a former password does not log in after Postgres has lost a reset', async (t) => {
  const { body, reset, userId } = await registerUser()
  const [{ password_hash }] = await userRows(body.mobile)
  t.equal((await api.resetPassword(reset)).statusCode, 200)
  await postgres.query('UPDATE users SET session_epoch = 0, password_hash = $2 WHERE id = $1', [userId, password_hash])
  t.equal((await api.logIn({ mobile: body.mobile, password: body.password })).statusCode, 401)
})
