import { mock } from 'node:test'
import type { FastifyInstance } from 'fastify'
import t, { type Test } from 'tap'
import { client, statusAndErrno } from '../testkit/client.js'
import { impatient, startTestbed } from '../testkit/testbed.js'
import { retried, until } from '../testkit/until.js'

/*
 * While a store fails, requests are refused at once. When it is back, it is used again.
 */

const { build, holdRedisWrites, log, openProxy, postgres, redis, signUpBody, stores } = await startTestbed(t)

const storeTimeoutMs = 1_000

/** The promise is 2 s: the longest pause between two attempts to connect is 1 s. The rest is for a busy machine. */
const recoveryMaxMs = 20_000

const reconnectPauseMaxMs = 1_000

/** Whether requests are refused without a round trip to the store. */
const isKnownToFail = {
  REDIS_URL: (app: FastifyInstance) => app.mobileSignup.redis.run(async ({ status }) => status !== 'ready'),
  DATABASE_URL: async ({ mobileSignup: { postgres } }: FastifyInstance) => {
    try {
      postgres.assertAvailable()
      return false
    } catch {
      return true
    }
  }
}

for (const store of ['REDIS_URL', 'DATABASE_URL'] as const) {
  for (const fault of ['stall', 'refuse'] as const) {
    t.test(`${store}, ${fault}: requests get 503 4001 at once, and the store is used again afterwards`, async (t) => {
      const proxy = await openProxy(t, store)
      const app = await build(t, { [store]: proxy.url, STORE_TIMEOUT_MS: `${storeTimeoutMs}` })
      const { signUp } = client(app)
      const reconnectPausesMs: number[] = []
      await app.mobileSignup.redis.run(async (redis) =>
        redis.on('reconnecting', (pauseMs) => reconnectPausesMs.push(pauseMs))
      )
      const before = await signUpBody()
      t.equal((await retried(() => signUp(before))).statusCode, 201)

      await proxy.apply(fault)
      const body = await signUpBody()
      t.strictSame(statusAndErrno(await signUp(body)), [503, '4001'])
      // For Postgres it takes another timeout: the first may have been a statement that waited for a lock.
      await until('the store is known to fail', () => isKnownToFail[store](app))
      const startedAt = Date.now()
      for (let index = 0; index < 10; index++) {
        t.strictSame(statusAndErrno(await signUp(await signUpBody())), [503, '4001'])
      }
      t.ok(Date.now() - startedAt < 5 * storeTimeoutMs, 'ten refusals do not take ten timeouts')

      await proxy.heal()
      const healedAt = Date.now()
      t.equal((await retried(() => signUp(body))).statusCode, 201)
      t.ok(Date.now() - healedAt < recoveryMaxMs, 'the store is used again in time')
      if (store === 'REDIS_URL') {
        t.ok(reconnectPausesMs.length > 0)
        for (const pauseMs of reconnectPausesMs) t.ok(pauseMs <= reconnectPauseMaxMs, `a pause of ${pauseMs} ms`)
      }
    })
  }
}

t.test('a second error of a socket to Redis, as TLS may emit, does not end the process', async (t) => {
  const { redis } = (await build(t)).mobileSignup
  const socket = await redis.run(async (client) => ('stream' in client ? client.stream : undefined))
  for (const message of ['the first', 'the second']) t.doesNotThrow(() => socket?.emit('error', new Error(message)))
  t.equal(socket?.listenerCount('error'), 1)
})

t.test('a statement that waits for a lock does not make other requests fail', async (t) => {
  const { signUp } = client(await build(t, { STORE_TIMEOUT_MS: `${storeTimeoutMs}` }))
  const [blocked, free] = [await signUpBody(), await signUpBody()]
  const connection = await postgres.connect()
  await connection.query('BEGIN')
  await connection.query(`INSERT INTO users (name, mobile, password_hash) VALUES ('', $1, '')`, [blocked.mobile])
  t.strictSame(statusAndErrno(await signUp(blocked)), [503, '4001'])
  t.equal((await retried(() => signUp(free))).statusCode, 201)
  await connection.query('ROLLBACK')
  connection.release()
  t.equal((await retried(() => signUp(blocked))).statusCode, 201)
})

t.test('a round trip has one deadline: a query whose connection becomes free late has only the rest', async (t) => {
  const env = { PG_POOL_MAX: '1', STORE_TIMEOUT_MS: '3000' }
  const [app, other] = [await build(t, env), await build(t, env)]
  const lock = (name: string, key: number) => ({ name, text: `SELECT pg_advisory_xact_lock(${key})` })
  const waiting = (count: number) =>
    until(`${count} statements wait for a lock`, async () => {
      const { rows } = await postgres.query(
        `SELECT count(*)::int FROM pg_locks WHERE locktype = 'advisory' AND NOT granted`
      )
      return rows[0].count === count
    })
  const holder = await postgres.connect()
  t.teardown(() => holder.release(true))
  await holder.query('SELECT pg_advisory_lock(1), pg_advisory_lock(2)')

  const ended: string[] = []
  const record = (name: string, query: Promise<unknown>) =>
    query.catch(({ cause }) => cause.message).then((message) => ended.push(`${name}: ${message}`))
  const first = app.mobileSignup.postgres.query(lock('first', 1), [])
  await waiting(1)
  // It begins while the only connection is busy.
  const startedAt = performance.now()
  const late = record('late', app.mobileSignup.postgres.query(lock('second', 2), []))
  await until('timers of now end clearly later', () => performance.now() - startedAt > 100)
  // It begins later, with a free connection. So it ends later, unless the other one gets another whole timeout.
  const reference = record('reference', other.mobileSignup.postgres.query(lock('second', 2), []))
  await waiting(2)
  await holder.query('SELECT pg_advisory_unlock(1)')
  await first
  await waiting(2)
  await Promise.all([late, reference])
  t.equal(ended[0], 'late: Query read timeout')
  t.match(ended[1], /^reference: /)
})

/** Begins a fault of all new connections to Postgres, for a service that connects with this URL. */
type NewConnectionFault = (t: Test) => Promise<{ url: string; begin(): unknown; end(): unknown }>

/** Begins with a role of its own, and ends with the change of that role. */
const withRole =
  (name: string, change: string): NewConnectionFault =>
  async () => {
    const url = Object.assign(new URL(stores.databaseUrl), { username: name, password: 'former' }).href
    await postgres.query(`CREATE ROLE ${name} LOGIN PASSWORD 'former'; GRANT ALL ON users TO ${name}`)
    return { url, begin: () => postgres.query(`ALTER ROLE ${name} ${change}`), end: () => undefined }
  }

const newConnectionFaults: Record<string, NewConnectionFault> = {
  'is refused': async (t) => {
    const proxy = await openProxy(t, 'DATABASE_URL')
    return { url: proxy.url, begin: () => proxy.applyToNew('refuse'), end: () => proxy.heal() }
  },
  hangs: async (t) => {
    const proxy = await openProxy(t, 'DATABASE_URL')
    return { url: proxy.url, begin: () => proxy.applyToNew('hang'), end: () => proxy.heal() }
  },
  'is one too many': withRole('crowded', 'CONNECTION LIMIT 1'),
  'has a password that was replaced': withRole('changed', "PASSWORD 'new'")
}

for (const [name, prepare] of Object.entries(newConnectionFaults)) {
  t.test(`a connection to Postgres that ${name} is no outage while another one answers`, async (t) => {
    const { url, begin, end } = await prepare(t)
    const app = await build(t, { DATABASE_URL: url, STORE_TIMEOUT_MS: '5000' })
    const bodies = await Promise.all(Array.from({ length: 20 }, () => signUpBody()))
    t.equal(app.mobileSignup.postgres.connections().total, 1)
    await begin()
    const replies = await Promise.all(bodies.map((body) => client(app).signUp(body)))
    t.strictSame(
      replies.map(({ statusCode }) => statusCode),
      bodies.map(() => 201)
    )
    t.strictSame((await app.inject('/health/ready')).json().data.failing, [])
    t.equal((await client(app).signUp(await signUpBody())).statusCode, 201)
    await end()
  })
}

t.test(
  'a Postgres that takes no new connection, and has just lost one, is not away while an idle one answers',
  async (t) => {
    const proxy = await openProxy(t, 'DATABASE_URL')
    const app = await build(t, { DATABASE_URL: proxy.url })
    const { query, connections } = app.mobileSignup.postgres
    const statement = (name: string) => ({ name, text: `SELECT '${name}'` })
    await Promise.all(['one', 'two'].map((name) => query(statement(name), [])))
    await until('the second connection is open, too', () => connections().idle === 2)
    proxy.applyToNew('refuse')
    proxy.strike('the third', { kind: 'reset' })
    await t.rejects(query(statement('the third'), []), { code: 'STORE_UNAVAILABLE' })
    // Longer than the probe, which is refused at once.
    for (let n = 0; n < 200; n++) await query(statement('one'), [])
    t.equal(connections().total, 1)
    await proxy.apply('refuse')
    await t.rejects(query(statement('one'), []), { code: 'STORE_UNAVAILABLE' }, 'without any it is away')
  }
)

t.test('a connection to Postgres is replaced after 24 to 36 minutes, each at its own time', async (t) => {
  const app = await build(t, { PG_POOL_MAX: '1' })
  let minutes = 0
  const { now } = performance
  const clock = mock.method(performance, 'now', () => now.call(performance) + minutes * 60_000)
  t.teardown(() => clock.mock.restore())
  const ages: number[] = []
  for (let n = 0; n < 12; n++) {
    await backendOf(app)
    const backend = await backendOf(app)
    let age = 0
    while (age < 60 && (await backendOf(app)) === backend) {
      minutes++
      age++
    }
    ages.push(age)
  }
  t.ok(Math.min(...ages) >= 24 && Math.max(...ages) <= 38, `${ages}`)
  t.ok(new Set(ages).size > 1, `${ages}`)
})

t.test('while Redis is away no command is queued, and afterwards none is sent again', async (t) => {
  const proxy = await openProxy(t, 'REDIS_URL')
  const { signUp } = client(await build(t, { REDIS_URL: proxy.url }))
  const body = await signUpBody()
  const wrong = { ...(await signUpBody()), sms_code: 'wrong' }
  proxy.strike(`sms_code_${body.mobile}`, { kind: 'refuse' })
  t.strictSame(statusAndErrno(await signUp(body)), [503, '4001'])
  await redis.config('RESETSTAT')
  const replies = await Promise.all(Array.from({ length: 10 }, () => signUp(wrong)))
  for (const reply of replies) t.strictSame(statusAndErrno(reply), [503, '4001'])

  await proxy.heal()
  t.equal((await retried(() => signUp(wrong))).statusCode, 422)
  t.equal(await redis.exists(`sms_code_${body.mobile}`), 1, 'the interrupted claim has not run')
  const commandStats = await redis.info('commandstats')
  const [, scripts] = /cmdstat_eval:calls=(\d+)/.exec(commandStats) ?? []
  t.equal(scripts, '1', 'only the last claim has reached Redis')
  t.notMatch(commandStats, /cmdstat_evalsha:/)
})

/** Returns the id of the connection of an application to Redis. */
const redisConnectionId = (app: FastifyInstance) => app.mobileSignup.redis.run((redis) => redis.call('CLIENT', 'ID'))

const untilRedisHasClosed = (connectionId: unknown) =>
  until(`Redis has closed connection ${connectionId}`, async () => {
    const connections = `${await redis.call('CLIENT', 'LIST')}`.split('\n')
    return !connections.some((connection) => connection.startsWith(`id=${connectionId} `))
  })

t.test('a Redis connection on which a command has timed out is dropped, and a new one is opened', async (t) => {
  const app = await build(t, impatient)
  const connectionId = await redisConnectionId(app)
  const [heldBody, nextBody] = [await signUpBody(), await signUpBody()]
  const writes = await holdRedisWrites(t)
  t.equal((await client(app).signUp(heldBody)).statusCode, 503)
  await writes.release()
  await untilRedisHasClosed(connectionId)
  t.equal((await retried(() => client(app).signUp(nextBody))).statusCode, 201)
  t.not(await redisConnectionId(app), connectionId)
})

// With ioredis's `socketTimeout` it is kept: each reply starts that timeout again.
t.test('a Redis connection is also dropped if it has answered another command meanwhile', async (t) => {
  const app = await build(t, impatient)
  const connectionId = await redisConnectionId(app)
  const writes = await holdRedisWrites(t)
  // WAIT is answered after 300 ms, and SET not before the release.
  const answers: number[] = []
  const commands = app.mobileSignup.redis.run((redis) =>
    Promise.all([redis.wait(1, 300).then((replicas) => answers.push(replicas)), redis.set('held', '')])
  )
  await t.rejects(commands, { code: 'STORE_UNAVAILABLE', cause: { message: 'Command timed out' } })
  t.strictSame(answers, [0], 'the other command was answered')
  await writes.release()
  await untilRedisHasClosed(connectionId)
})

/** Returns the process id of Postgres behind the only connection of an application. */
async function backendOf({ mobileSignup: { postgres } }: FastifyInstance): Promise<number | undefined> {
  const backendId = { name: 'backend_id', text: 'SELECT pg_backend_pid() AS id' }
  return (await postgres.query<{ id: number }>(backendId, [])).rows[0]?.id
}

t.test('an SQL error does not cost the connection, also if Postgres has cancelled the statement', async (t) => {
  const app = await build(t, { PG_POOL_MAX: '1' })
  const backend = await backendOf(app)
  await t.rejects(app.mobileSignup.postgres.query({ name: 'fails', text: 'SELECT 1 / 0' }, []), {
    message: 'division by zero'
  })
  await app.mobileSignup.postgres.query({ name: 'timeout', text: 'SET statement_timeout = 1' }, [])
  await t.rejects(app.mobileSignup.postgres.query({ name: 'sleeps', text: 'SELECT pg_sleep(60)' }, []), {
    cause: { message: 'canceling statement due to statement timeout' }
  })
  t.equal(await backendOf(app), backend)
})

t.test('a prepared statement that fails for ever costs the connection, which forgets it', async (t) => {
  const app = await build(t, { PG_POOL_MAX: '1' })
  await postgres.query('CREATE TABLE changed (n integer)')
  const select = () => app.mobileSignup.postgres.query({ name: 'select_changed', text: 'SELECT n FROM changed' }, [])
  await select()
  for (const change of ['ALTER TABLE changed ALTER n TYPE bigint', 'DEALLOCATE ALL']) {
    if (change === 'DEALLOCATE ALL') await app.mobileSignup.postgres.query({ name: 'deallocate', text: change }, [])
    else await postgres.query(change)
    await t.rejects(select(), { message: /cached plan|does not exist/ }, change)
    await select()
  }
})

t.test(
  'a connection to a Postgres that is read-only or ends it is dropped, and the check of Postgres fails',
  async (t) => {
    const app = await build(t, { PG_POOL_MAX: '1' })
    const setReadOnly = { name: 'set_read_only', text: 'SET default_transaction_read_only = on' }
    const { signUp } = client(app)

    const first = await backendOf(app)
    await app.mobileSignup.postgres.query(setReadOnly, [])
    const body = await signUpBody()
    t.strictSame(statusAndErrno(await signUp(body)), [503, '4001'])
    t.equal((await signUp(body)).statusCode, 201, 'the next connection is used')
    const second = await backendOf(app)
    t.not(second, first)

    await app.mobileSignup.postgres.query(setReadOnly, [])
    await t.rejects(app.mobileSignup.postgres.checkWritable(), { cause: { message: 'Postgres is read-only' } })
    t.not(await backendOf(app), second)
    await app.mobileSignup.postgres.checkWritable()
  }
)

t.test('a start warns if Redis may evict codes and sessions, which have a TTL', async (t) => {
  t.teardown(() => redis.config('SET', 'maxmemory-policy', 'noeviction'))
  for (const [policy, warns] of [
    ['allkeys-lru', true],
    ['volatile-ttl', true],
    ['volatile-lfu', true],
    ['noeviction', false]
  ] as const) {
    await redis.config('SET', 'maxmemory-policy', policy)
    const before = log().length
    await build(t)
    t.equal(/may evict codes and sessions/.test(log().slice(before)), warns, policy)
  }
})

t.test('an idle Postgres connection that fails does not end the process', async (t) => {
  const app = await build(t)
  const result = await postgres.query('SELECT pg_terminate_backend($1, 10000) AS "isTerminated"', [
    await backendOf(app)
  ])
  t.strictSame(result.rows, [{ isTerminated: true }])
  const body = await signUpBody()
  t.equal((await retried(() => client(app).signUp(body))).statusCode, 201)
})

t.test('a start that fails leaves no connection open', async (t) => {
  const { href: REDIS_URL, port: METRICS_PORT } = Object.assign(new URL(stores.redisUrl), { pathname: '/5' })
  await t.rejects(build(t, { REDIS_URL, METRICS_PORT }), { code: 'EADDRINUSE' })
  await until('its connections are closed', async () => !`${await redis.client('LIST')}`.includes(' db=5 '))
})
