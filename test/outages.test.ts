import type { FastifyInstance } from 'fastify'
import type { Redis } from 'ioredis'
import t, { type Test } from 'tap'
import { client, statusAndErrno } from '../testkit/client.js'
import { movePerformanceClock } from '../testkit/moved-clock.js'
import { redisUser } from '../testkit/rights.js'
import { impatient, startTestbed } from '../testkit/testbed.js'
import { withDocumentedRights } from '../testkit/topologies.js'
import { isFulfilled, retried, until } from '../testkit/until.js'

/*
 * While a store fails, requests are refused at once: 503 4001, a retry may succeed. When it is back, it is used again. A bug is
 * 500 4500: a retry does not help, and an alert names the cause.
 */

const { build, buildWithLog, holdInserts, holdRedisWrites, log, openProxy, postgres, redis, signUpBody, stores } =
  await startTestbed(t)

const rights = await withDocumentedRights(stores)

/** Returns the process id of Postgres behind the only connection of an application. */
async function backendOf({ mobileSignup: { postgres } }: FastifyInstance): Promise<number | undefined> {
  const backendId = { name: 'backend_id', text: 'SELECT pg_backend_pid() AS id' }
  return (await postgres.query<{ id: number }>(backendId, [])).rows[0]?.id
}

/** Runs a statement on the connection of an application. */
const queryOf = ({ mobileSignup: { postgres } }: FastifyInstance, text: string) =>
  postgres.query({ name: text, text }, [])

for (const store of ['REDIS_URL', 'DATABASE_URL'] as const) {
  t.test(`${store} stalls: requests get 503 4001 at once, and the store is used again afterwards`, async (t) => {
    const timeoutMs = 1_000
    const proxy = await openProxy(t, store)
    const app = await build(t, { [store]: proxy.url, STORE_TIMEOUT_MS: `${timeoutMs}` })
    const { signUp } = client(app)
    const pausesMs: number[] = []
    await app.mobileSignup.redis.run(async (redis) => redis.on('reconnecting', (pauseMs) => pausesMs.push(pauseMs)))
    const body = await signUpBody()

    await proxy.apply('stall')
    t.strictSame(statusAndErrno(await signUp(body)), [503, '4001'])
    // For Postgres it takes another timeout: the first may have been a statement that waited for a lock.
    await until('ten refusals take less than one timeout', async () => {
      const startedAt = Date.now()
      for (let index = 0; index < 10; index++) t.strictSame(statusAndErrno(await signUp(body)), [503, '4001'])
      return Date.now() - startedAt < timeoutMs
    })
    await proxy.heal()
    t.equal((await retried(() => signUp(body))).statusCode, 201)
    for (const pauseMs of pausesMs) t.ok(pauseMs <= 1_000, `a pause of ${pauseMs} ms between two attempts to connect`)
    t.equal(pausesMs.length > 0, store === 'REDIS_URL')
  })
}

t.test('a second error of a socket to Redis, as TLS may emit, does not end the process', async (t) => {
  const { redis } = (await build(t)).mobileSignup
  const socket = await redis.run(async (client) => ('stream' in client ? client.stream : undefined))
  for (const message of ['the first', 'the second']) t.doesNotThrow(() => socket?.emit('error', new Error(message)))
  t.equal(socket?.listenerCount('error'), 1)
})

t.test('a statement that waits for a lock does not make other requests fail', async (t) => {
  const { signUp } = client(await build(t, { STORE_TIMEOUT_MS: '1000' }))
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
  const first = queryOf(app, 'SELECT pg_advisory_xact_lock(1)')
  await waiting(1)
  // It begins while the only connection is busy.
  const startedAt = performance.now()
  const late = record('late', queryOf(app, 'SELECT pg_advisory_xact_lock(2)'))
  await until('timers of now end clearly later', () => performance.now() - startedAt > 100)
  // It begins later, with a free connection. So it ends later, unless the other one gets another whole timeout.
  const reference = record('reference', queryOf(other, 'SELECT pg_advisory_xact_lock(2)'))
  await waiting(2)
  await holder.query('SELECT pg_advisory_unlock(1)')
  await first
  await waiting(2)
  await Promise.all([late, reference])
  t.equal(ended[0], 'late: Query read timeout')
  t.match(ended[1], /^reference: /)
})

t.test('a connection to Postgres that hangs, or is one too many, is no outage while another one answers', async (t) => {
  const proxy = await openProxy(t, 'DATABASE_URL')
  await postgres.query(`CREATE ROLE crowded LOGIN PASSWORD 'one'; GRANT ALL ON users TO crowded`)
  const crowded = Object.assign(new URL(stores.databaseUrl), { username: 'crowded', password: 'one' }).href
  for (const [DATABASE_URL, begin] of [
    [proxy.url, async () => proxy.applyToNew('hang')],
    [crowded, () => postgres.query('ALTER ROLE crowded CONNECTION LIMIT 1')]
  ] as const) {
    const app = await build(t, { DATABASE_URL, STORE_TIMEOUT_MS: '5000' })
    const bodies = await Promise.all(Array.from({ length: 20 }, () => signUpBody()))
    t.equal(app.mobileSignup.postgres.connections().total, 1)
    await begin()
    const replies = await Promise.all(bodies.map((body) => client(app).signUp(body)))
    for (const { statusCode } of replies) t.equal(statusCode, 201)
    t.strictSame((await app.inject('/health/ready')).json().data.failing, [])
    t.equal((await client(app).signUp(await signUpBody())).statusCode, 201)
  }
})

t.test(
  'a Postgres that takes no new connection, and has just lost one, is not away while an idle one answers',
  async (t) => {
    const proxy = await openProxy(t, 'DATABASE_URL')
    const app = await build(t, { DATABASE_URL: proxy.url })
    const { connections } = app.mobileSignup.postgres
    await Promise.all(['one', 'two'].map((name) => queryOf(app, `SELECT '${name}'`)))
    await until('the second connection is open, too', () => connections().idle === 2)
    proxy.applyToNew('refuse')
    proxy.strike('the third', { kind: 'reset' })
    await t.rejects(queryOf(app, `SELECT 'the third'`), { code: 'STORE_UNAVAILABLE' })
    // Longer than the probe, which is refused at once.
    for (let n = 0; n < 200; n++) await queryOf(app, `SELECT 'one'`)
    t.equal(connections().total, 1)
    await proxy.apply('refuse')
    await t.rejects(queryOf(app, `SELECT 'one'`), { code: 'STORE_UNAVAILABLE' }, 'without any it is away')
  }
)

t.test('a connection to Postgres is replaced after 24 to 36 minutes, each at its own time', async (t) => {
  const app = await build(t, { PG_POOL_MAX: '1' })
  const { pass } = movePerformanceClock(t)
  const ages: number[] = []
  for (let n = 0; n < 6; n++) {
    await backendOf(app)
    const backend = await backendOf(app)
    let minutes = 0
    for (; minutes < 60 && (await backendOf(app)) === backend; minutes++) pass(60_000)
    ages.push(minutes)
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

// With ioredis's `socketTimeout` it is kept: each reply starts that timeout again.
t.test(
  'a Redis connection on which a command has timed out is replaced, also if it has answered another',
  async (t) => {
    const app = await build(t, impatient)
    const connectionId = () => app.mobileSignup.redis.run((redis) => redis.call('CLIENT', 'ID'))
    const former = await connectionId()
    const writes = await holdRedisWrites(t)
    // WAIT is answered after 300 ms, and SET not before the release.
    const answers: number[] = []
    const commands = app.mobileSignup.redis.run((redis) =>
      Promise.all([redis.wait(1, 300).then((replicas) => answers.push(replicas)), redis.set('held', '')])
    )
    await t.rejects(commands, { code: 'STORE_UNAVAILABLE', cause: { message: 'Command timed out' } })
    t.strictSame(answers, [0], 'the other command was answered')
    await writes.release()
    await until(`Redis has closed connection ${former}`, async () => {
      const connections = `${await redis.client('LIST')}`.split('\n')
      return !connections.some((connection) => connection.startsWith(`id=${former} `))
    })
    const body = await signUpBody()
    t.equal((await retried(() => client(app).signUp(body))).statusCode, 201)
    t.not(await connectionId(), former)
  }
)

t.test('an SQL error does not cost the connection, also if Postgres has cancelled the statement', async (t) => {
  const app = await build(t, { PG_POOL_MAX: '1' })
  const backend = await backendOf(app)
  await t.rejects(queryOf(app, 'SELECT 1 / 0'), { message: 'division by zero' })
  await queryOf(app, 'SET statement_timeout = 1')
  await t.rejects(queryOf(app, 'SELECT pg_sleep(60)'), {
    cause: { message: 'canceling statement due to statement timeout' }
  })
  t.equal(await backendOf(app), backend)
})

t.test('a prepared statement that fails for ever costs the connection, which forgets it', async (t) => {
  const app = await build(t, { PG_POOL_MAX: '1' })
  await postgres.query('CREATE TABLE changed (n integer)')
  const select = () => queryOf(app, 'SELECT n FROM changed')
  await select()
  await postgres.query('ALTER TABLE changed ALTER n TYPE bigint')
  await t.rejects(select(), { message: /cached plan/ })
  await select()
  await queryOf(app, 'DEALLOCATE ALL')
  await t.rejects(select(), { message: /does not exist/ })
  await select()
})

t.test('a connection to a Postgres that is read-only is dropped, and the check of Postgres fails', async (t) => {
  const app = await build(t, { PG_POOL_MAX: '1' })
  const { signUp } = client(app)
  const first = await backendOf(app)
  await queryOf(app, 'SET default_transaction_read_only = on')
  const body = await signUpBody()
  t.strictSame(statusAndErrno(await signUp(body)), [503, '4001'])
  t.equal((await signUp(body)).statusCode, 201, 'the next connection is used')
  const second = await backendOf(app)
  t.not(second, first)

  await queryOf(app, 'SET default_transaction_read_only = on')
  await t.rejects(app.mobileSignup.postgres.checkWritable(), { cause: { message: 'Postgres is read-only' } })
  t.not(await backendOf(app), second)
  await app.mobileSignup.postgres.checkWritable()
})

t.test('a start warns if Redis may evict codes and sessions, and fails if Redis is too old', async (t) => {
  t.teardown(() => redis.config('SET', 'maxmemory-policy', 'noeviction'))
  for (const policy of ['allkeys-lru', 'volatile-ttl', 'noeviction']) {
    await redis.config('SET', 'maxmemory-policy', policy)
    const before = log().length
    await build(t)
    t.equal(/may evict codes and sessions/.test(log().slice(before)), policy !== 'noeviction', policy)
  }
  const proxy = await openProxy(t, 'REDIS_URL')
  const [, version = ''] = /redis_version:(\S+)/.exec(await redis.info('server')) ?? []
  const old = `5${version.slice(1)}`
  proxy.strike('\r\nserver\r\n', { kind: 'replace', from: `version:${version}`, to: `version:${old}` })
  await t.rejects(build(t, { REDIS_URL: proxy.url }), {
    message: `Redis is too old: version ${old}, expected 6.2 or later`
  })
})

t.test('a start that fails leaves no connection open', async (t) => {
  const { href: REDIS_URL, port: METRICS_PORT } = Object.assign(new URL(stores.redisUrl), { pathname: '/5' })
  await t.rejects(build(t, { REDIS_URL, METRICS_PORT }), { code: 'EADDRINUSE' })
  await until('its connections are closed', async () => !`${await redis.client('LIST')}`.includes(' db=5 '))
})

/** Ends every connection of the service to Postgres, so that it opens a new one. */
const endBackends = () =>
  postgres.query(`SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE usename = 'mobile_signup'`)

const answers = (redis: Pick<Redis, 'ping'>) => isFulfilled(redis.ping())

interface Failure {
  isOutage: boolean
  /** The message of the store. */
  message: RegExp
  cause(mobile: string, t: Test): Promise<unknown>
  cure?(mobile: string): Promise<unknown>
}

const failures: Record<string, Failure> = {
  'the role in Postgres lacks the right to insert': {
    isOutage: false,
    message: /permission denied for table users/,
    cause: () => postgres.query('REVOKE INSERT ON users FROM mobile_signup'),
    cure: () => postgres.query('GRANT INSERT (name, mobile, password_hash) ON users TO mobile_signup')
  },
  'Postgres ends an idle connection, and has no free one': {
    isOutage: true,
    message: /too many connections for role/,
    cause: () => postgres.query('ALTER ROLE mobile_signup CONNECTION LIMIT 0').then(endBackends),
    cure: () => postgres.query('ALTER ROLE mobile_signup CONNECTION LIMIT -1')
  },
  'Postgres ends the connection during the INSERT': {
    isOutage: true,
    message: /terminating connection due to administrator command/,
    async cause(_mobile, t) {
      const inserts = await holdInserts(t)
      inserts.arrived(1).then(endBackends).then(inserts.release)
    }
  },
  'a key in Redis has another type': {
    isOutage: false,
    message: /WRONGTYPE/,
    cause: (mobile) => redis.lpush(`{sms_code_${mobile}}:guesses`, 'a list'),
    cure: (mobile) => redis.del(`{sms_code_${mobile}}:guesses`)
  },
  'the user in Redis lacks the right to run scripts': {
    isOutage: false,
    message: /NOPERM/,
    cause: () => redis.call('ACL', 'SETUSER', redisUser, '-eval', '-evalsha'),
    cure: () => redis.call('ACL', 'SETUSER', redisUser, '+eval', '+evalsha')
  },
  'Redis runs a long script': {
    isOutage: true,
    message: /BUSY Redis is busy/,
    async cause(_mobile, t) {
      await redis.config('SET', 'busy-reply-threshold', '1')
      const other = redis.duplicate()
      t.teardown(() => other.disconnect())
      other.eval('while true do end', 0).catch(() => undefined)
      await until('Redis is busy', async () => !(await answers(redis)))
    },
    async cure() {
      await redis.call('SCRIPT', 'KILL')
      await until('Redis is not busy', () => answers(redis))
      await redis.config('SET', 'busy-reply-threshold', '5000')
    }
  },
  'Redis closes the connection during a command': {
    isOutage: true,
    message: /Connection is closed|Reached the max retries/,
    async cause(_mobile, t) {
      const writes = await holdRedisWrites(t)
      until('a command waits', async () => /cmd=eval/.test(`${await redis.client('LIST')}`))
        .then(() => redis.call('CLIENT', 'KILL', 'USER', redisUser))
        .then(writes.release)
    }
  }
}

for (const [name, { isOutage, message, cause, cure }] of Object.entries(failures)) {
  t.test(`G4: ${name}: ${isOutage ? '503 4001' : '500 4500'}, and the log has the cause`, async (t) => {
    const { app, lines } = await buildWithLog(t, { ...rights, PG_POOL_MAX: '1' })
    const { signUp } = client(app)
    const body = await signUpBody()
    await cause(body.mobile, t)
    const reply = await signUp(body, { headers: { 'x-request-id': 'r1' } })
    const failing = isOutage ? [] : (await app.inject('/health/ready')).json().data.failing
    t.notOk(failing.includes('Postgres') || failing.includes('Redis'), 'a bug is no outage')
    await cure?.(body.mobile)
    t.strictSame(statusAndErrno(reply), isOutage ? [503, '4001'] : [500, '4500'])

    const errors = lines.filter(({ level }) => level === 50)
    const warnings = lines.filter(({ msg }) => `${msg}`.startsWith('a round trip'))
    t.match(isOutage ? warnings[0] : errors[0], { err: { message } })
    t.equal(warnings.length, isOutage ? 1 : 0)
    t.strictSame(
      errors.map(({ msg, reqId }) => [msg, reqId]),
      isOutage ? [] : [['internal_error', 'r1']]
    )
    t.equal((await retried(() => signUp(body))).statusCode, 201, 'the same request succeeds afterwards')
  })
}

t.test('each SQLSTATE is an outage or a bug', async (t) => {
  const { query } = (await build(t)).mobileSignup.postgres
  const outages = ['08006', '08P01', '25006', '40001', '40P01', '53100', '53200', '53300', '57014', '57P01', '57P03']
  const bugs = ['0A000', '22003', '23505', '25001', '26000', '42501', '42703', '42P01', '58030', 'P0001', 'XX000']
  for (const state of [...outages, ...bugs]) {
    const text = `DO $$ BEGIN RAISE EXCEPTION 'of the test' USING ERRCODE = '${state}'; END $$`
    const expected = outages.includes(state)
      ? { code: 'STORE_UNAVAILABLE', cause: { code: state } }
      : { code: state, message: 'of the test' }
    await t.rejects(query({ name: state, text }, []), expected, state)
  }
  const circular: Record<string, unknown> = {}
  circular.self = circular
  const statement = { name: 'a value that no store takes', text: 'SELECT $1::jsonb' }
  await t.rejects(query(statement, [circular]), { name: 'TypeError' }, statement.name)
})

t.test('each reply of Redis is an outage or a bug, also in the middle of a script error', async (t) => {
  const { run } = (await build(t)).mobileSignup.redis
  const bugs = ['CROSSSLOT', 'ERR value is not an integer', 'MOVED 1', 'NOAUTH', 'NOPERM', 'WRONGTYPE', 'BUSYGROUP']
  const states = ['BUSY', 'CLUSTERDOWN', 'MASTERDOWN', 'MISCONF', 'NOREPLICAS', 'OOM', 'TRYAGAIN']
  // The service drops the connection after the last two.
  const outages = ['ERR max number of clients reached', ...states, 'LOADING', 'READONLY']
  for (const reply of [...bugs, ...outages]) {
    for (const message of [`${reply} and so on`, `ERR Error running script: @user_script:1: -${reply} and so on`]) {
      await until('Redis is connected', () => run(answers))
      const expected = outages.includes(reply) ? { code: 'STORE_UNAVAILABLE', cause: { message } } : { message }
      const answer = run((client) => client.eval('return redis.error_reply(ARGV[1])', 0, message))
      await t.rejects(answer, expected, message)
    }
  }
  const bug = run(() => {
    throw new TypeError('of the test')
  })
  await t.rejects(bug, { name: 'TypeError' })
})
