import { randomUUID } from 'node:crypto'
import type { Redis } from 'ioredis'
import t, { type Test } from 'tap'
import { client, statusAndErrno } from '../testkit/client.js'
import { postgresRole, redisRules, redisUser } from '../testkit/rights.js'
import { startTestbed } from '../testkit/testbed.js'
import { retried, until } from '../testkit/until.js'

/*
 * An outage of a store is 503 4001: a retry may succeed. A bug is 500 4500: a retry does not help, and an alert names the cause.
 */

const { build, holdInserts, holdRedisWrites, postgres, redis, signUpBody, stores } = await startTestbed(t)

const password = 'of-the-service'
await postgres.query(postgresRole(password))
await redis.call('ACL', 'SETUSER', redisUser, ...redisRules(password))

const urlOf = (storeUrl: string, username: string) => Object.assign(new URL(storeUrl), { username, password }).href
const rights = {
  DATABASE_URL: urlOf(stores.databaseUrl, 'mobile_signup'),
  REDIS_URL: urlOf(stores.redisUrl, redisUser)
}

/** Ends every connection of the service to Postgres, so that it opens a new one. */
const endBackends = () =>
  postgres.query(`SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE usename = 'mobile_signup'`)

const answers = (redis: Pick<Redis, 'ping'>) =>
  redis.ping().then(
    () => true,
    () => false
  )

interface Failure {
  name: string
  isOutage: boolean
  /** The message of the store. */
  message: RegExp
  cause(mobile: string, t: Test): Promise<unknown>
  cure(mobile: string): Promise<unknown>
}

const failures: Failure[] = [
  {
    name: 'the role in Postgres lacks the right to insert',
    isOutage: false,
    message: /permission denied for table users/,
    cause: () => postgres.query('REVOKE INSERT ON users FROM mobile_signup'),
    cure: () => postgres.query('GRANT INSERT (name, mobile, password_hash) ON users TO mobile_signup')
  },
  {
    name: 'a column is missing',
    isOutage: false,
    message: /column "password_hash" .*does not exist/,
    cause: () => postgres.query('ALTER TABLE users RENAME password_hash TO renamed'),
    cure: () => postgres.query('ALTER TABLE users RENAME renamed TO password_hash')
  },
  {
    name: 'the table is missing, because the migration was forgotten',
    isOutage: false,
    message: /relation "users" does not exist/,
    cause: () => postgres.query('ALTER TABLE users RENAME TO renamed'),
    cure: () => postgres.query('ALTER TABLE renamed RENAME TO users')
  },
  {
    name: 'Postgres has no free connection',
    isOutage: true,
    message: /too many connections for role/,
    async cause() {
      await postgres.query('ALTER ROLE mobile_signup CONNECTION LIMIT 0')
      await endBackends()
    },
    cure: () => postgres.query('ALTER ROLE mobile_signup CONNECTION LIMIT -1')
  },
  {
    name: 'Postgres ends the connection during the INSERT',
    isOutage: true,
    message: /terminating connection due to administrator command/,
    async cause(_mobile, t) {
      const inserts = await holdInserts(t)
      inserts
        .arrived(1)
        .then(endBackends)
        .then(() => inserts.release())
    },
    cure: async () => undefined
  },
  {
    name: 'a key in Redis has another type',
    isOutage: false,
    message: /WRONGTYPE/,
    cause: (mobile) => redis.lpush(`{sms_code_${mobile}}:guesses`, 'a list'),
    cure: (mobile) => redis.del(`{sms_code_${mobile}}:guesses`)
  },
  {
    name: 'the user in Redis lacks the right to run scripts',
    isOutage: false,
    message: /NOPERM/,
    cause: () => redis.call('ACL', 'SETUSER', redisUser, '-eval', '-evalsha'),
    cure: () => redis.call('ACL', 'SETUSER', redisUser, '+eval', '+evalsha')
  },
  {
    name: 'Redis is full',
    isOutage: true,
    message: /OOM command not allowed/,
    cause: () => redis.config('SET', 'maxmemory', '1'),
    cure: () => redis.config('SET', 'maxmemory', '0')
  },
  {
    name: 'Redis has too few replicas',
    isOutage: true,
    message: /NOREPLICAS/,
    cause: () => redis.config('SET', 'min-replicas-to-write', '1'),
    cure: () => redis.config('SET', 'min-replicas-to-write', '0')
  },
  {
    name: 'Redis is a replica',
    isOutage: true,
    message: /READONLY/,
    cause: () => redis.replicaof('127.0.0.1', 1),
    cure: () => redis.replicaof('NO', 'ONE')
  },
  {
    name: 'Redis is a replica whose data may be stale',
    isOutage: true,
    message: /MASTERDOWN/,
    async cause() {
      await redis.config('SET', 'replica-serve-stale-data', 'no')
      await redis.replicaof('127.0.0.1', 1)
    },
    async cure() {
      await redis.replicaof('NO', 'ONE')
      await redis.config('SET', 'replica-serve-stale-data', 'yes')
    }
  },
  {
    name: 'Redis runs a long script',
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
  {
    name: 'Redis closes the connection during a command',
    isOutage: true,
    message: /Connection is closed|Reached the max retries/,
    async cause(_mobile, t) {
      const writes = await holdRedisWrites(t)
      until('a command waits', async () => /cmd=eval/.test(`${await redis.client('LIST')}`))
        .then(() => redis.call('CLIENT', 'KILL', 'USER', redisUser))
        .then(() => writes.release())
    },
    cure: async () => undefined
  }
]

for (const { name, isOutage, message, cause, cure } of failures) {
  t.test(`${name}: ${isOutage ? '503 4001' : '500 4500'}, and the log has the cause`, async (t) => {
    const lines: Record<string, unknown>[] = []
    const logStream = { write: (line: string) => void lines.push(JSON.parse(line)) }
    const app = await build(t, { ...rights, PG_POOL_MAX: '1' }, { logStream })
    const { signUp } = client(app)
    const body = await signUpBody()
    await cause(body.mobile, t)
    const reply = await signUp(body, { headers: { 'x-request-id': 'r1' } })
    const failing = isOutage ? [] : (await app.inject('/health/ready')).json().data.failing
    t.notOk(failing.includes('Postgres') || failing.includes('Redis'), 'a bug is no outage')
    await cure(body.mobile)
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
})

t.test('each reply of Redis is an outage or a bug, also in the middle of a script error', async (t) => {
  const { run } = (await build(t)).mobileSignup.redis
  const bugs = [
    'CROSSSLOT Keys in request do not hash to the same slot',
    'ERR value is not an integer or out of range',
    'MOVED 1 127.0.0.1:1',
    'NOAUTH Authentication required.',
    "NOPERM this user has no permissions to run the 'get' command",
    'WRONGTYPE Operation against a key holding the wrong kind of value',
    'BUSYGROUP Consumer Group name already exists'
  ]
  const outages = [
    'BUSY Redis is busy running a script.',
    'CLUSTERDOWN The cluster is down',
    'ERR max number of clients reached',
    "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
    'MISCONF Redis is configured to save RDB snapshots',
    'NOREPLICAS Not enough good replicas to write.',
    "OOM command not allowed when used memory > 'maxmemory'.",
    'TRYAGAIN Multiple keys request during rehashing of slot',
    // The service drops the connection after these.
    'LOADING Redis is loading the dataset in memory',
    "READONLY You can't write against a read only replica."
  ]
  for (const reply of [...bugs, ...outages]) {
    for (const message of [reply, `ERR Error running script (call to f_0): @user_script:1: -${reply}`]) {
      await until('Redis is connected', () => run(answers))
      const expected = outages.includes(reply) ? { code: 'STORE_UNAVAILABLE', cause: { message } } : { message }
      await t.rejects(
        run((client) => client.eval('return redis.error_reply(ARGV[1])', 0, message)),
        expected,
        message
      )
    }
  }
})

t.test('a value that no store takes is a bug', async (t) => {
  const { postgres, redis } = (await build(t)).mobileSignup
  const circular: Record<string, unknown> = {}
  circular.self = circular
  const statement = { name: randomUUID(), text: 'SELECT $1::jsonb' }
  await t.rejects(postgres.query(statement, [circular]), { name: 'TypeError' })
  await t.rejects(
    redis.run(() => {
      throw new TypeError('of the test')
    }),
    { name: 'TypeError' }
  )
})
