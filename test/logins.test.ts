import { hash, verify } from '@node-rs/argon2'
import type { FastifyInstance } from 'fastify'
import t from 'tap'
import { FaultProxy } from './fault-proxy.js'
import {
  brief,
  build,
  cookieOf,
  newMobile,
  post,
  postgres,
  redis,
  signUpBody,
  stores,
  until,
  userRow,
  whoAmI
} from './helper.js'

const logIn = (app: FastifyInstance, payload: object, from = '192.0.2.1', headers = {}) =>
  app.inject({ method: 'POST', url: '/api/v1.0/sessions', payload, remoteAddress: from, headers })

async function registered(app: FastifyInstance) {
  const { mobile, password, ...rest } = await signUpBody()
  const reply = await post(app, { mobile, password, ...rest })
  return { mobile, password, userId: reply.json().data.user_id, cookie: cookieOf(reply) }
}

t.test('201: the password logs in, with a fresh session; the old one of the request ends', async (t) => {
  const app = await build(t)
  const { mobile, password, userId, cookie } = await registered(app)
  const reply = await logIn(app, { mobile, password }, '192.0.2.1', { cookie })
  t.equal(reply.statusCode, 201)
  t.strictSame(reply.json(), {
    errno: '0',
    errmsg: '登录成功',
    data: { user_id: userId, name: mobile, mobile, session: true }
  })
  t.equal(await whoAmI(app, cookieOf(reply)), 200)
  t.equal(await whoAmI(app, cookie), 401)
})

t.test('401 4102 for a wrong password and for an unknown mobile, alike', async (t) => {
  const app = await build(t)
  const { mobile } = await registered(app)
  const replies = [
    await logIn(app, { mobile, password: 'a wrong one' }),
    await logIn(app, { mobile: newMobile(), password: 'a wrong one' }),
    await logIn(app, { mobile, password: 'short' })
  ]
  for (const reply of replies) {
    t.strictSame([reply.statusCode, reply.json()], [401, { errno: '4102', errmsg: '用户名或密码错误' }])
    t.equal(reply.cookies.length, 0)
  }
})

t.test('400: a field that is absent or malformed, a password over 128 characters', async (t) => {
  const app = await build(t)
  const mobile = newMobile()
  for (const [body, errmsg] of [
    [{ mobile }, '参数不完整'],
    [{ mobile, password: 1 }, '参数错误'],
    [{ mobile: '1', password: 'a password' }, '手机号格式错误'],
    [{ mobile, password: '§'.repeat(129) }, '密码须为8至128个字符']
  ] as const) {
    const reply = await logIn(app, body)
    t.strictSame([reply.statusCode, reply.json()], [400, { errno: '4103', errmsg }])
  }
  t.equal((await logIn(app, { mobile, password: '§'.repeat(128) })).statusCode, 401)
})

t.test('5 failures in 10 minutes for a mobile and an address: 429, but not from elsewhere', async (t) => {
  const app = await build(t)
  const { mobile, password } = await registered(app)
  for (let n = 0; n < 4; n++) t.equal((await logIn(app, { mobile, password: 'wrong' })).statusCode, 401)
  t.equal((await logIn(app, { mobile, password })).statusCode, 201, 'a success clears the pair')
  for (let n = 0; n < 5; n++) t.equal((await logIn(app, { mobile, password: 'wrong' })).statusCode, 401)
  const refused = await logIn(app, { mobile, password })
  t.strictSame(brief(refused), [429, '4201'])
  t.ok(Number(refused.headers['retry-after']) > 590 && Number(refused.headers['retry-after']) <= 600)
  t.equal((await logIn(app, { mobile, password }, '192.0.2.2')).statusCode, 201, 'the owner is not locked out')
  t.equal((await logIn(app, { mobile: newMobile(), password })).statusCode, 401, 'nor anybody else')
})

t.test('of 50 simultaneous guesses, on two instances, exactly 5 are looked at', async (t) => {
  const apps = [await build(t), await build(t)]
  const mobile = newMobile()
  const replies = await Promise.all(
    Array.from({ length: 50 }, (_, n) => {
      const app = apps[n % 2]
      if (app === undefined) throw new Error('no instance')
      return logIn(app, { mobile, password: `guess ${n}` })
    })
  )
  t.equal(replies.filter(({ statusCode }) => statusCode === 401).length, 5)
  t.equal(replies.filter(({ statusCode }) => statusCode === 429).length, 45)
})

t.test('100 failures an hour for a mobile over all addresses: 429', async (t) => {
  const app = await build(t)
  const { mobile, password } = await registered(app)
  const statuses: number[] = []
  for (let n = 0; n < 102; n++) {
    statuses.push((await logIn(app, { mobile, password: 'wrong' }, `192.0.2.${n}`)).statusCode)
  }
  t.strictSame(statuses, [...Array.from({ length: 100 }, () => 401), 429, 429])
  const reply = await logIn(app, { mobile, password }, '198.51.100.1')
  t.equal(reply.statusCode, 429)
  t.ok(Number(reply.headers['retry-after']) > 3_500)
})

t.test('under overload a login is refused by admission: 503 4500, and the throttle is not touched', async (t) => {
  const app = await build(t, { HASH_MEMORY_KIB: '65536', HASH_PASSES: '3', HASH_THREADS: '1', HASH_MAX_WAIT_MS: '0' })
  const bodies = [await signUpBody(), await signUpBody()]
  const working = bodies.map((body) => post(app, body))
  await until(async () => (await redis.exists(...bodies.map(({ mobile }) => `sms_code_${mobile}`))) === 0)
  await new Promise(setImmediate)
  const mobile = newMobile()
  const reply = await logIn(app, { mobile, password: 'a password' })
  t.strictSame(brief(reply), [503, '4500'])
  t.strictSame(await redis.keys(`login_failures:*${mobile}*`), [])
  await Promise.all(working)
})

t.test('a fault of ours is no failure of theirs: 503 4001, not counted', async (t) => {
  const proxy = await FaultProxy.open(stores.databaseUrl)
  t.teardown(() => proxy.close())
  const app = await build(t, { DATABASE_URL: proxy.url })
  const { mobile, password } = await registered(app)
  proxy.strike('find_user', { kind: 'reset' })
  t.strictSame(brief(await logIn(app, { mobile, password })), [503, '4001'])
  t.strictSame(await redis.keys(`login_failures:*${mobile}*`), [])
})

t.test('a hash of other parameters is replaced after a login, and no newer password is overwritten', async (t) => {
  const [before, after] = [await build(t), await build(t, { HASH_PASSES: '2', STORE_TIMEOUT_MS: '30000' })]
  const { mobile, password } = await registered(before)
  t.equal((await logIn(after, { mobile, password: 'wrong' })).statusCode, 401)
  t.match((await userRow(mobile))[0].password_hash, /m=64,t=1,p=1/)
  t.equal((await logIn(after, { mobile, password })).statusCode, 201)
  await until(async () => (await userRow(mobile))[0].password_hash.includes('m=64,t=2,p=1'))
  t.equal(await verify((await userRow(mobile))[0].password_hash, password), true)

  // The barrier: the row is locked by whoever changes the password, and the rehash waits behind.
  const raced = await registered(before)
  const client = await postgres.connect()
  await client.query('BEGIN')
  const newer = await hash('a newer password')
  await client.query('UPDATE users SET password_hash = $2 WHERE mobile = $1', [raced.mobile, newer])
  t.equal((await logIn(after, raced)).statusCode, 201, 'the answer does not wait')
  await until(async () => {
    const { rows } = await postgres.query(
      `SELECT 1 FROM pg_stat_activity WHERE query LIKE 'UPDATE%' AND wait_event_type = 'Lock'`
    )
    return rows.length === 1
  })
  await client.query('COMMIT')
  client.release()
  await until(async () => {
    const { rows } = await postgres.query(
      `SELECT 1 FROM pg_stat_activity WHERE query LIKE 'UPDATE%' AND state = 'active'`
    )
    return rows.length === 0
  })
  t.equal((await userRow(raced.mobile))[0].password_hash, newer)
})

t.test('a login whose password is reset meanwhile leaves no session', async (t) => {
  const proxy = await FaultProxy.open(stores.redisUrl)
  t.teardown(() => proxy.close())
  const app = await build(t, { REDIS_URL: proxy.url })
  const user = await registered(app)
  // The session is on its way when the password changes, and all sessions that are there end.
  const held = proxy.strike('session:', { kind: 'delay', ms: 300 })
  const reply = logIn(app, user)
  await held
  await postgres.query('UPDATE users SET password_hash = $2 WHERE mobile = $1', [
    user.mobile,
    await hash('a newer password')
  ])
  t.strictSame(brief(await reply), [401, '4102'])
  t.match((await reply).headers['set-cookie'], /Max-Age=0|Expires=Thu, 01 Jan 1970/)
  const sessions = await redis.zrange(`sessions_of:${user.userId}`, 0, '-1')
  t.equal(sessions.length, 1, 'but the one of the sign-up')
})

t.test('DELETE /session?everywhere=true ends all sessions of the user, and nobody else’s', async (t) => {
  const app = await build(t)
  const [user, other] = [await registered(app), await registered(app)]
  const second = cookieOf(await logIn(app, user))
  const leave = (cookie: string, query: string) =>
    app.inject({ method: 'DELETE', url: `/api/v1.0/session${query}`, headers: { cookie } })
  t.equal((await leave(user.cookie, '?everywhere=maybe')).statusCode, 400)
  const third = cookieOf(await logIn(app, user))
  t.equal((await leave(third, '')).statusCode, 200)
  t.strictSame([await whoAmI(app, user.cookie), await whoAmI(app, third)], [200, 401], 'only one without it')
  t.equal((await leave(second, '?everywhere=true')).statusCode, 200)
  t.strictSame([await whoAmI(app, user.cookie), await whoAmI(app, second)], [401, 401])
  t.equal(await whoAmI(app, other.cookie), 200)
  t.equal(await redis.exists(`sessions_of:${user.userId}`), 0)
})

t.test('a user has at most 100 sessions: one more ends the oldest', async (t) => {
  const app = await build(t)
  const user = await registered(app)
  const now = Math.floor(Date.now() / 1_000)
  const earlier = Array.from({ length: 99 }, (_, n) => [now + 10 + n, `earlier-${n}`]).flat()
  await redis.zadd(`sessions_of:${user.userId}`, ...earlier)
  await redis.zadd(`sessions_of:${user.userId}`, now - 1, 'expired')
  await redis.mset('session:earlier-0', '{}', 'session:earlier-1', '{}')
  t.equal((await logIn(app, user)).statusCode, 201)
  t.equal(await redis.zcard(`sessions_of:${user.userId}`), 100)
  t.strictSame(await redis.mget('session:earlier-0', 'session:earlier-1'), [null, '{}'])
  const life = await redis.ttl(`sessions_of:${user.userId}`)
  t.ok(life > 86_300 && life <= 86_400, 'the index ends with the last of them')
})

t.test('503 4001: a login whose session cannot be stored', async (t) => {
  const proxy = await FaultProxy.open(stores.redisUrl)
  t.teardown(() => proxy.close())
  const app = await build(t, { REDIS_URL: proxy.url })
  const user = await registered(app)
  proxy.strike('session:', { kind: 'reset' })
  t.strictSame(brief(await logIn(app, user)), [503, '4001'])
})
