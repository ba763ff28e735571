import { randomInt } from 'node:crypto'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import type { FastifyInstance } from 'fastify'
import { Redis } from 'ioredis'
import pg from 'pg'
import t, { type Test } from 'tap'
import { buildApp } from '../src/app.js'
import { type Environment, loadConfig } from '../src/config/config.js'
import { EmbeddedStores } from '../src/dev/stores.js'
import { migrate } from '../src/stores/migrations.js'

/*
 * Each test file is a process with a Postgres and a Redis of its own, in a folder of its own.
 */
const directory = await mkdtemp(join(tmpdir(), 'mobile-signup-test-'))
export const stores = await EmbeddedStores.prepare(directory)
await stores.start()
await migrate(stores.databaseUrl)

export const redis = new Redis(stores.redisUrl)
export const postgres = new pg.Pool({ connectionString: stores.databaseUrl })
// A connection that the pool has ended may still hear that the server ends.
postgres.on('error', () => undefined)

/** What the applications' description says, by `METHOD /path`, of the outcomes that may be answered there. */
const described = new Map<string, Set<string>>()

/** The log of all applications that this file builds, and the words that must not stand in it (G7). */
let log = ''
const secrets = new Set<string>()
const logStream = {
  write(line: string) {
    log += line
  }
}

t.teardown(async () => {
  try {
    await end()
  } catch (error) {
    // tap tells no more than that there was one.
    process.stderr.write(`${error instanceof Error ? error.stack : error}\n`)
    throw error
  }
})

async function end(): Promise<void> {
  redis.disconnect()
  await postgres.end()
  await stores.stop()
  await rm(directory, { recursive: true })
  const leaked = [...secrets].filter((secret) => log.includes(secret))
  if (leaked.length > 0) throw new Error(`G7: a password, code, session id or full mobile is in the log: ${leaked}`)
  const undescribed = answered().filter(([operation, outcome]) => !described.get(operation)?.has(outcome))
  if (undescribed.length > 0) throw new Error(`answered, but not described: ${undescribed.join(' ')}`)
}

export const sessionSecret = 'a secret of at least thirty-two characters'

export function testConfig(env: Environment = {}) {
  return loadConfig({
    DATABASE_URL: stores.databaseUrl,
    REDIS_URL: stores.redisUrl,
    SESSION_SECRET: sessionSecret,
    HASH_MEMORY_KIB: '64',
    HASH_PASSES: '1',
    ...env
  })
}

/** The service as production builds it, closed after the test. */
export async function build(t: Test, env: Environment = {}, config = testConfig(env)): Promise<FastifyInstance> {
  const app = await buildApp(config, logStream)
  t.after(() => app.close())
  for (const [path, operations] of Object.entries(app.swagger().paths ?? {})) {
    for (const [method, operation] of Object.entries(operations ?? {})) {
      described.set(
        `${method.toUpperCase()} ${path}`,
        new Set(JSON.stringify(operation).match(/(?<=")[a-z_]+(?=":\{"summary)/g))
      )
    }
  }
  return app
}

/** What the log says that was answered on the routes, as [`METHOD /path`, outcome]. */
function answered(): [string, string][] {
  return log
    .split('\n')
    .filter((line) => line.includes('"outcome":'))
    .map((line) => JSON.parse(line))
    .filter(({ method, route }) => described.has(`${method} ${route}`))
    .map(({ method, route, outcome }) => [`${method} ${route}`, outcome])
}

export const logLines = () => log

export function newMobile(): string {
  const mobile = `139${randomInt(100_000_000).toString().padStart(8, '0')}`
  secrets.add(mobile)
  return mobile
}

/** A code as an SMS service writes it. Letters, as six digits may stand in a log by chance. */
export async function issueCode(mobile: string, code = `c${randomInt(2 ** 40).toString(36)}`): Promise<string> {
  secrets.add(code)
  await redis.set(`sms_code_${mobile}`, code, 'EX', 300)
  return code
}

/** The body of a sign-up that will succeed, but for the changes. */
export async function signUpBody(changes: Record<string, unknown> = {}) {
  const mobile = typeof changes.mobile === 'string' ? changes.mobile : newMobile()
  const password = `Tr0ub4dor&${randomInt(2 ** 40).toString(36)}`
  secrets.add(password)
  return { mobile, sms_code: await issueCode(mobile), password, password2: password, ...changes }
}

export function post(app: FastifyInstance, payload: string | object, headers: Record<string, string> = {}) {
  return app.inject({
    method: 'POST',
    url: '/api/v1.0/users',
    headers: { 'content-type': 'application/json', ...headers },
    payload
  })
}

/** The name and the value of a reply's one session cookie. */
export function cookieOf(reply: { cookies: readonly { name: string; value: string }[] }): string {
  const [cookie] = reply.cookies
  if (cookie === undefined) throw new Error('the reply sets no cookie')
  const sessionId = decodeURIComponent(cookie.value).split('.')[0]
  if (sessionId) secrets.add(sessionId)
  return `${cookie.name}=${cookie.value}`
}

export async function userRow(mobile: string) {
  const { rows } = await postgres.query('SELECT * FROM users WHERE mobile = $1', [mobile])
  return rows
}

/** The attempt marker of a mobile's code, in Redis. */
export const markerKey = (mobile: string) => `{sms_code_${mobile}}:attempt`

/** The status and the errno of a reply. */
export const brief = (reply: { statusCode: number; json(): { errno: string } }) => [
  reply.statusCode,
  reply.json().errno
]

/** The status of asking who is logged in. */
export const whoAmI = async (app: FastifyInstance, cookie: string) =>
  (await app.inject({ url: '/api/v1.0/session', headers: { cookie } })).statusCode

/** Waits for a condition on a store: the barriers of the tests. It ends with the test's own timeout. */
export async function until(condition: () => Promise<boolean>): Promise<void> {
  while (!(await condition())) await sleep(5)
}

/** Holds every INSERT into `users` until it is released: a barrier in front of the row. */
export async function holdInserts() {
  const client = await postgres.connect()
  await client.query('BEGIN; LOCK TABLE users IN EXCLUSIVE MODE')
  return {
    /** Waits until so many INSERTs stand before the barrier. */
    async arrived(count: number) {
      await until(async () => {
        const { rows } = await postgres.query(
          `SELECT count(*)::int FROM pg_locks WHERE relation = 'users'::regclass AND NOT granted`
        )
        return rows[0].count === count
      })
    },
    async release() {
      await client.query('COMMIT')
      client.release()
    }
  }
}

/** Holds every write on Redis, as a server that does not answer, until it is released. */
export async function holdRedisWrites() {
  await redis.client('PAUSE', 60_000, 'WRITE')
  return { release: () => redis.client('UNPAUSE') }
}
