import { randomInt } from 'node:crypto'
import { mock } from 'node:test'
import type { FastifyInstance, FastifyPluginAsync } from 'fastify'
import type { Test } from 'tap'
import { type BuildOptions, buildApp } from '#src/app.js'
import { type Config, type Environment, loadConfig } from '#src/config/config.js'
import { SignedTokens } from '#src/http/signed-tokens.js'
import type { Reply } from './client.js'
import { FaultProxy } from './fault-proxy.js'
import { startStores } from './private-stores.js'
import { ServerProcess } from './server-process.js'
import { assertNothingRefused, poolerTimeoutMs, startTopology } from './topologies.js'
import { until } from './until.js'

/** Makes tests fast: cheap hashes, one hash thread, and no page /docs. */
const fastSettings = { HASH_MEMORY_KIB: '64', HASH_PASSES: '1', HASH_THREADS: '1', DOCS: 'false' }

/**
 * The default of tests: no round trip times out, no lease expires, and no queue is too long. A store or a hash that is slow on a
 * busy machine has not failed.
 */
export const patient = { STORE_TIMEOUT_MS: '30000', HASH_MAX_WAIT_MS: '20000' }

/** All tests of a file guess from the same addresses. A test of these limits sets its own numbers. */
export const wideGuessLimits = { SMS_GUESS_IP_HOURLY_MAX: '1000000', SMS_GUESS_HOURLY_MAX: '1000000' }

/** Where the applications of all tests run: unset, `cluster`, `sentinel`, `pooler`, `rights`, or the URL of a migrated Postgres. */
const { TESTBED_STORES = '' } = process.env

/** For a test in which a store hangs. */
export const impatient = { STORE_TIMEOUT_MS: TESTBED_STORES === 'pooler' ? `${poolerTimeoutMs}` : '2000' }

export type Testbed = Awaited<ReturnType<typeof startTestbed>>
export type SignUpBody = Awaited<ReturnType<Testbed['signUpBody']>>

/**
 * Starts private stores for a test file, and stops them at its end. Then it checks the log of every application that the file
 * has built: it contains no secret (guarantee G7), and OpenAPI describes every outcome in it.
 *
 * TESTBED_STORES lets the same tests run elsewhere: on a Redis Cluster, with Sentinel, through PgBouncer, with the rights of
 * docs/operating.md, or on another engine.
 */
export async function startTestbed(t: Test) {
  const isUrl = TESTBED_STORES.startsWith('postgres')
  const stores = await startStores(isUrl ? TESTBED_STORES : undefined)
  const topology = TESTBED_STORES && !isUrl ? await startTopology(t, TESTBED_STORES, stores) : { environment: {} }
  const { postgres, redis } = { ...stores, ...topology }
  const environment: Record<string, string> = {
    ...stores.environment,
    ...patient,
    ...wideGuessLimits,
    ...topology.environment
  }

  let log = ''
  const logStream = {
    write(line: string) {
      log += line
    }
  }
  const secrets = new Set<string>()
  /** The outcomes that OpenAPI describes, by `METHOD /path`. */
  const describedOutcomes = new Map<string, Set<string>>()

  t.teardown(async () => {
    await assertNothingRefused(topology).finally(() => stores.stop())
    const leaked = [...secrets].filter((secret) => log.includes(secret))
    if (leaked.length > 0)
      throw new Error(`G7: a password, code, ticket, session id or full mobile is in the log: ${leaked}`)
    for (const line of log.split('\n').filter((line) => line.includes('"outcome":'))) {
      const { method, route, outcome } = JSON.parse(line)
      const isDescribed = describedOutcomes.get(`${method} ${route}`)?.has(outcome) ?? true
      // Nobody receives the answer to a client that has disconnected.
      if (!isDescribed && outcome !== 'client_disconnected')
        throw new Error(`OpenAPI does not describe ${method} ${route} ${outcome}`)
    }
  })

  function config(env: Environment = {}): Config {
    return loadConfig({ ...environment, ...fastSettings, ...env })
  }

  /**
   * Builds the service on the private stores with the function that production uses, and closes it after the test.
   *
   * @param page is registered beside the service
   */
  async function build(
    t: Test,
    env: Environment = {},
    { page, ...options }: BuildOptions & { page?: FastifyPluginAsync<{ config: Config }> } = {}
  ): Promise<FastifyInstance> {
    const settings = config(env)
    const app = await buildApp(settings, { logStream, ...options })
    t.after(() => app.close())
    if (page) await app.register(page, { config: settings })
    await app.ready()
    const { createTicket } = app.mobileSignup.codes
    app.mobileSignup.codes.createTicket = (mobile) => {
      const ticket = createTicket(mobile)
      secrets.add(ticket)
      return ticket
    }
    for (const [path, operations] of Object.entries(app.swagger().paths ?? {})) {
      for (const [method, operation] of Object.entries(operations ?? {})) {
        // An example is named after its outcome and begins with a summary.
        const names = JSON.stringify(operation).match(/(?<=")[a-z_]+(?=":\{"summary)/g)
        describedOutcomes.set(`${method.toUpperCase()} ${path}`, new Set(names))
      }
    }
    return app
  }

  /** Builds an application, and collects its log lines. */
  async function buildWithLog(t: Test, env: Environment = {}) {
    const lines: Record<string, unknown>[] = []
    const app = await build(t, env, { logStream: { write: (line) => void lines.push(JSON.parse(line)) } })
    return { app, lines }
  }

  /** Builds an application that calls a function before each hash. The function may wait or throw. */
  async function buildHashingAfter(t: Test, beforeHash: () => Promise<unknown>, env: Environment = {}) {
    const app = await build(t, env)
    const { hash } = app.mobileSignup.passwords
    app.mobileSignup.passwords.hash = async (...args) => {
      await beforeHash()
      return hash(...args)
    }
    return app
  }

  /** Starts the built service as a process on the private stores, and kills it after the test. */
  function startService(t: Test, env: Environment = {}, stdout?: number): ServerProcess {
    const service = ServerProcess.start(undefined, { env: { ...fastSettings, ...environment, ...env }, stdout })
    t.teardown(() => service.dispose())
    return service
  }

  /** Opens a fault proxy in front of a store, and closes it after the test. */
  async function openProxy(t: Test, store: 'DATABASE_URL' | 'REDIS_URL'): Promise<FaultProxy> {
    if (store === 'REDIS_URL' && /cluster|sentinel/.test(TESTBED_STORES)) skip(t, 'a proxy needs a single Redis')
    const proxy = await FaultProxy.open(environment[store] ?? '')
    t.teardown(() => proxy.close())
    return proxy
  }

  function newMobile(): string {
    const mobile = `139${randomInt(100_000_000).toString().padStart(8, '0')}`
    secrets.add(mobile)
    return mobile
  }

  /** Stores a code as another SMS service does. It has letters, because six digits could be in the log by accident. */
  async function issueCode(mobile: string, code = `c${randomInt(2 ** 40).toString(36)}`): Promise<string> {
    secrets.add(code)
    await redis.set(`sms_code_${mobile}`, code, 'EX', 300)
    return code
  }

  /** Stores a code for a new mobile, and returns the body of a sign-up with it. The changes may make the body invalid. */
  async function signUpBody(changes: Record<string, unknown> = {}) {
    const mobile = typeof changes.mobile === 'string' ? changes.mobile : newMobile()
    const password = `Tr0ub4dor&${randomInt(2 ** 40).toString(36)}`
    secrets.add(password)
    return { mobile, sms_code: await issueCode(mobile), password, password2: password, ...changes }
  }

  /** Returns the session cookie of a reply, as `name=value`. From then on its session id counts as a secret. */
  function cookieOf(reply: Pick<Reply, 'cookies'>): string {
    const [cookie] = reply.cookies
    if (cookie === undefined) throw new Error('the reply sets no cookie')
    const pair = `${cookie.name}=${cookie.value}`
    for (const { value } of reply.cookies) if (value) secrets.add(`${value.split('.')[0]}`)
    return pair
  }

  /** Returns a ticket or a device token that was issued so many seconds ago. */
  function tokenOf(purpose: 'ticket' | 'device', mobile: string, ageSeconds: number, secret?: string): string {
    const now = Date.now()
    const clock = mock.method(Date, 'now', () => now - ageSeconds * 1_000)
    const lifeMs = purpose === 'ticket' ? 3_600_000 : 31_536_000_000
    const token = new SignedTokens([secret ?? `${environment.SESSION_SECRET}`], purpose, lifeMs).issue(mobile)
    clock.mock.restore()
    return token
  }

  async function userRows(mobile: string) {
    const { rows } = await postgres.query('SELECT * FROM users WHERE mobile = $1', [mobile])
    return rows
  }

  /** A barrier in front of the users table: blocks every write until it is released, at the latest at the end of the test. */
  async function holdInserts(t: Test) {
    const connection = await postgres.connect()
    await connection.query('BEGIN; LOCK TABLE users IN EXCLUSIVE MODE')
    let isReleased = false
    async function release() {
      if (isReleased) return
      isReleased = true
      await connection.query('COMMIT')
      connection.release()
    }
    t.teardown(release)
    return {
      /** Waits until exactly so many writes are blocked. */
      arrived: (count: number) =>
        until(`${count} writes are blocked`, async () => {
          const { rows } = await postgres.query(
            `SELECT count(*)::int FROM pg_locks WHERE relation = 'users'::regclass AND NOT granted`
          )
          return rows[0].count === count
        }),
      release
    }
  }

  /** Blocks every write on Redis until it is released, for at most 60 s, like a server that hangs. */
  async function holdRedisWrites(t: Test) {
    await redis.client('PAUSE', 60_000, 'WRITE')
    const release = () => redis.client('UNPAUSE')
    t.teardown(release)
    return { release }
  }

  /** Waits until the codes of these sign-ups have left Redis: requests hold them. */
  const untilHeld = (...bodies: { mobile: string }[]) =>
    until('the codes are held', async () => {
      return (await redis.exists(...bodies.map(({ mobile }) => `sms_code_${mobile}`))) === 0
    })

  async function readClaim(mobile: string): Promise<StoredClaim> {
    const claim = await redis.get(claimKey(mobile))
    if (claim === null) throw new Error('the mobile has no claim')
    return JSON.parse(claim)
  }

  /** Moves the end of a lease into the past, so that a test does not wait for it. */
  async function ageClaim(mobile: string, ms: number): Promise<void> {
    const claim = await readClaim(mobile)
    await redis.set(claimKey(mobile), JSON.stringify({ ...claim, until: claim.until - ms }), 'KEEPTTL')
  }

  return {
    stores,
    postgres,
    redis,
    config,
    build,
    buildWithLog,
    buildHashingAfter,
    startService,
    openProxy,
    log: () => log,
    newMobile,
    issueCode,
    signUpBody,
    cookieOf,
    tokenOf,
    userRows,
    holdInserts,
    holdRedisWrites,
    untilHeld,
    readClaim,
    ageClaim
  }
}

/** Ends a test that has begun. tap itself can only skip one before. */
function skip(t: Test, reason: string): never {
  t.options.skip = reason
  t.end()
  t.threw = () => undefined
  throw new Error(reason)
}

/** What tests read of a claim. */
interface StoredClaim {
  code: string
  holder?: string
  /** The end of the lease, in ms since 1970; 0 if nobody holds the code. */
  until: number
  may_have_written?: true
  used_by?: string
}

/** Returns the lease of an application. */
export const leaseMsOf = ({ hashMaxWaitMs, storeTimeoutMs }: Pick<Config, 'hashMaxWaitMs' | 'storeTimeoutMs'>) =>
  hashMaxWaitMs + 5 * storeTimeoutMs

/** The key of a mobile's claim. A copy, so that a test fails if the service changes it. */
export const claimKey = (mobile: string) => `{sms_code_${mobile}}:claim`

/** Returns the session id in a cookie of `cookieOf`, `sid=<id>.<signature>`. */
export const sessionIdOf = (cookie: string) => `${cookie.split(/[=.]/)[1]}`

/** Returns the Redis key of the session of a cookie. A copy of the contract, as above. */
export const sessionKeyOf = (cookie: string) => `session:${sessionIdOf(cookie)}`
