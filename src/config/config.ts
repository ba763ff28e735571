import { randomBytes } from 'node:crypto'
import { availableParallelism } from 'node:os'
import { languages } from '../outcomes.js'
import {
  addressRanges,
  anyText,
  hostName,
  integer,
  oneOf,
  onOrOff,
  type Parser,
  pathPrefix,
  redisUrl,
  secretMinLength,
  secrets,
  trueOrFalse,
  url
} from './parsers.js'

export type Environment = Readonly<Record<string, string | undefined>>

/** What the service runs with, frozen. `readVariables` says what each field means. */
export type Config = Readonly<ReturnType<typeof readVariables>> & {
  /** `NODE_ENV` is `production`. */
  readonly production: boolean
}

/** The longest password, in code points. It bounds the work of one request; NIST SP 800-63B asks for at least 64. */
export const passwordMax = 128

/** The longest life of a code that production may allow, in seconds (NIST SP 800-63B, section 3.1.3.2; OWASP ASVS 6.5.5). */
const productionCodeTtlMaxS = 600

/** The shortest password that production may allow, in code points (NIST SP 800-63B). */
const productionPasswordMin = 8

/**
 * The argon2id settings of equal strength in OWASP's Password Storage Cheat Sheet, as [KiB, passes] with one lane.
 * A setting is strong enough if its memory and its passes are at least those of one entry.
 */
export const owaspArgon2id = [
  [47_104, 1],
  [19_456, 2],
  [12_288, 3],
  [9_216, 4],
  [7_168, 5]
] as const

const day = 86_400

/**
 * Reads one variable.
 *
 * @param meaning completes its row in docs/configuration.md
 * @param shownDefault replaces a default value that the page cannot show
 * @returns the parsed value, or `whenAbsent` if the variable is unset, empty or invalid
 */
type Read = <T>(name: string, parser: Parser<T>, whenAbsent: T, meaning: string, shownDefault?: string) => T

/** Every variable but NODE_ENV: its field, name, parser, default and meaning. docs/configuration.md lists the same. */
export function readVariables(read: Read, production: boolean) {
  return {
    port: read('PORT', integer(0, 65_535), 3000, 'Port to listen on; 0 takes a free one.'),
    host: read('HOST', hostName, '127.0.0.1', 'Address to listen on.'),
    databaseUrl: readDatabaseUrl(read),
    redisUrl: read(
      'REDIS_URL',
      redisUrl,
      '',
      'Redis, `redis://…` or `rediss://…`. Required in production. See [stores](#stores).'
    ),
    /** The first one signs, all of them verify. */
    sessionSecrets: read<readonly [string, ...string[]]>(
      'SESSION_SECRET',
      secrets,
      [randomBytes(secretMinLength).toString('base64url')],
      `Signs the session cookie. At least ${secretMinLength} random characters: see [secrets](operating.md#secrets). Several, separated by commas: the first signs, all verify. Required in production.`,
      'random'
    ),
    cookieSecure: read(
      'COOKIE_SECURE',
      trueOrFalse,
      production,
      'Whether the cookie has `Secure` and the name `__Host-sid`; otherwise it is `sid`.'
    ),
    trustProxy: read<readonly string[]>(
      'TRUST_PROXY',
      addressRanges,
      [],
      'Addresses and CIDRs of the proxies whose `X-Forwarded-*` headers count, separated by commas, or `none`. Required in production: limits count the address of the client.',
      'none'
    ),
    /** Starts with a slash and ends without one; empty for the root. */
    apiPrefix: read('API_PREFIX', pathPrefix, '/api/v1.0', 'Path in front of all routes; `/` for none.'),
    legacyStatus: read(
      'LEGACY_STATUS',
      trueOrFalse,
      false,
      'Answers every outcome with status 200, as the Flask handler did. Probes keep their status.'
    ),
    defaultLanguage: read(
      'DEFAULT_LANGUAGE',
      oneOf(...languages),
      'zh',
      'Language of the messages where `Accept-Language` does not choose: `zh` or `en`.'
    ),
    /** In code points. */
    passwordMin: read(
      'PASSWORD_MIN',
      integer(production ? productionPasswordMin : 1, passwordMax),
      8,
      `Shortest password, in characters; at least ${productionPasswordMin} in production.`
    ),
    /** Whether this service sends the codes. If not, another service writes them to Redis. */
    sms: read('SMS', onOrOff, true, '`off`: another service sends the codes, and `POST /sms_codes` is absent.', 'on'),
    smsWebhookUrl: read<string | undefined>(
      'SMS_WEBHOOK_URL',
      url('https:', 'http:'),
      undefined,
      'Receives each code. Required in production unless `SMS=off`. Without it nothing is sent, and the codes stay in Redis.'
    ),
    smsWebhookSecret: read<string | undefined>(
      'SMS_WEBHOOK_SECRET',
      anyText,
      undefined,
      'Signs the requests to the webhook. See [secrets](operating.md#secrets).'
    ),
    smsCodeTtlS: read(
      'SMS_CODE_TTL_S',
      integer(1, production ? productionCodeTtlMaxS : day),
      300,
      `TTL of a code, in seconds; at most ${productionCodeTtlMaxS} in production.`
    ),
    smsResendS: read('SMS_RESEND_S', integer(0, day), 60, 'Seconds between two codes for a mobile; 0: no limit.'),
    smsDailyMax: read('SMS_DAILY_MAX', integer(0, 1_000_000), 10, 'Codes for a mobile in 24 hours; 0: no limit.'),
    smsIpHourlyMax: read(
      'SMS_IP_HOURLY_MAX',
      integer(0, 1_000_000_000),
      20,
      'Codes in an hour that nobody has used, for an IPv4 address or an IPv6 /64; 64 times as many for an IPv6 /48. 0: no limit.'
    ),
    smsPrefixHourlyMax: read(
      'SMS_PREFIX_HOURLY_MAX',
      integer(0, 1_000_000_000),
      200,
      'Codes in an hour that nobody has used, for the first seven digits of a mobile; 0: no limit.'
    ),
    smsHourlyMax: read(
      'SMS_HOURLY_MAX',
      integer(0, 1_000_000_000),
      5_000,
      'Codes in an hour that nobody has used, in all; 0: no limit.'
    ),
    smsCodeAttempts: read(
      'SMS_CODE_ATTEMPTS',
      integer(1, 1_000),
      5,
      'Wrong codes for a mobile, for a ticket in its life or, without a ticket, for a network in an hour.'
    ),
    smsGuessDailyMax: read(
      'SMS_GUESS_DAILY_MAX',
      integer(0, 1_000_000),
      50,
      'Wrong codes for a mobile in the 24 hours from the first, for all without a ticket; 0: no limit.'
    ),
    smsGuessIpHourlyMax: read(
      'SMS_GUESS_IP_HOURLY_MAX',
      integer(0, 1_000_000_000),
      50,
      'Wrong codes in an hour over all mobiles, without a ticket, for an IPv4 address or an IPv6 /64; 64 times as many for an IPv6 /48. 0: no limit.'
    ),
    smsGuessHourlyMax: read(
      'SMS_GUESS_HOURLY_MAX',
      integer(0, 1_000_000_000),
      1_000,
      'Wrong codes in an hour over all mobiles, for all without a ticket; 0: no limit.'
    ),
    loginIpHourlyMax: read(
      'LOGIN_IP_HOURLY_MAX',
      integer(0, 1_000_000_000),
      100,
      'Failed logins in an hour for an IPv4 address or an IPv6 /64; 64 times as many for an IPv6 /48. 0: no limit.'
    ),
    hashMemoryKib: read(
      'HASH_MEMORY_KIB',
      integer(8, 4_194_304),
      12_288,
      "Memory of one argon2id hash, in KiB. Production refuses settings weaker than [OWASP's list](https://cheatsheetseries.owasp.org/cheatsheets/Password_Storage_Cheat_Sheet.html)."
    ),
    hashPasses: read('HASH_PASSES', integer(1, 1_000), 3, 'Passes of argon2id over that memory.'),
    ...readThreads(read),
    hashMaxWaitMs: read(
      'HASH_MAX_WAIT_MS',
      integer(0, 600_000),
      2_000,
      'A request whose hash would wait longer is refused with 503 `4500`. Milliseconds.'
    ),
    pgPooler: read(
      'PG_POOLER',
      oneOf('none', 'transaction'),
      'none',
      '`transaction`: between the service and Postgres is a pooler in transaction mode, such as PgBouncer. See [operating.md](operating.md#poolers).'
    ),
    pgPoolMax: read('PG_POOL_MAX', integer(1, 1_000), 10, 'Connections to Postgres.'),
    storeTimeoutMs: read(
      'STORE_TIMEOUT_MS',
      integer(1, 60_000),
      1_000,
      'Timeout of each round trip to Postgres or Redis, in milliseconds.'
    ),
    docs: read('DOCS', trueOrFalse, !production, 'Serves the page `/docs`, on which the API can be tried.'),
    metricsPort: read<number | undefined>(
      'METRICS_PORT',
      integer(0, 65_535),
      undefined,
      'Port on which Prometheus scrapes `/metrics`; 0 takes a free one. Unset: no metrics.'
    ),
    otlpEndpoint: read<string | undefined>(
      'OTEL_EXPORTER_OTLP_ENDPOINT',
      url('https:', 'http:'),
      undefined,
      'Where OpenTelemetry sends spans. Unset: OpenTelemetry is not loaded.'
    ),
    logLevel: read(
      'LOG_LEVEL',
      oneOf('fatal', 'error', 'warn', 'info', 'debug', 'trace', 'silent'),
      'info',
      '`fatal`, `error`, `warn`, `info`, `debug`, `trace` or `silent`.'
    ),
    keepAliveTimeoutMs: read(
      'KEEP_ALIVE_TIMEOUT_MS',
      integer(1_000, 3_600_000),
      72_000,
      'How long an idle connection stays open, in milliseconds. At least as long as the gateway keeps it, or requests meet a closing connection.'
    ),
    shutdownDelayMs: read(
      'SHUTDOWN_DELAY_MS',
      integer(0, 600_000),
      0,
      'Milliseconds from the signal to the shutdown. Readiness fails meanwhile, so the balancer can react.'
    ),
    shutdownTimeoutMs: read(
      'SHUTDOWN_TIMEOUT_MS',
      integer(1, 600_000),
      15_000,
      'The longest that the shutdown may take after that, in milliseconds. Less than `HASH_MAX_WAIT_MS` + 5 × `STORE_TIMEOUT_MS` may end requests without an answer.'
    ),
    migrate: read(
      'MIGRATE',
      trueOrFalse,
      true,
      'Whether a start applies pending migrations. It cannot with a pooler, so the default is then `false`.'
    )
  }
}

/** The size of libuv's thread pool, unless the environment sets it. */
export const defaultPoolThreads = 4

/** Reads how many threads libuv's pool has, and how many of them may hash at a time. */
function readThreads(read: Read) {
  const poolThreads = read(
    'UV_THREADPOOL_SIZE',
    integer(1, 1_024),
    defaultPoolThreads,
    "Threads of libuv's pool. Best as many as `HASH_THREADS`. Before Node.js 24.3, and in a host application, only the environment of the process can change it.",
    `\`HASH_THREADS\`; before Node.js 24.3: ${defaultPoolThreads}`
  )
  const hashThreads = read(
    'HASH_THREADS',
    integer(1, 1_024),
    Math.min(availableParallelism(), poolThreads),
    'Passwords that are hashed at a time.',
    'number of cores, at most `UV_THREADPOOL_SIZE`'
  )
  return { poolThreads, hashThreads }
}

const databaseUrlParser: Parser<string> = {
  expected: 'a URL that starts with postgres:// or postgresql://, with one host',
  parse(text) {
    // node-postgres looks such a list up as one name.
    if (/^\w+:\/\/([^/?#]*@)?[^/?#@]*,[^@]*$|[?&]host=[^&]*(,|%2C)/i.test(text))
      throw new Error('the value has more than one host')
    return url('postgres:', 'postgresql:').parse(text)
  }
}

function readDatabaseUrl(read: Read): string {
  const meaning = 'Postgres, `postgresql://…`. Required in production. See [stores](#stores).'
  return read('DATABASE_URL', databaseUrlParser, '', meaning)
}

/** An invalid environment. Its message has a line for each fault and prints no secret. */
export class ConfigError extends Error {
  override readonly name = 'ConfigError'

  constructor(readonly faults: readonly string[]) {
    super(`invalid environment:\n${faults.map((fault) => `  ${fault}`).join('\n')}`)
  }
}

/** Reads from an environment, and records what is invalid in `faults`. An empty variable counts as unset. */
function environmentReader(env: Environment, faults: string[]): Read {
  return (name, parser, whenAbsent) => {
    const value = env[name]
    if (!value) return whenAbsent
    try {
      return parser.parse(value)
    } catch (error) {
      faults.push(`${name}: ${error instanceof Error ? error.message : error}; expected ${parser.expected}`)
      return whenAbsent
    }
  }
}

/**
 * Reads the configuration from environment variables.
 *
 * @throws {ConfigError} which names every invalid variable
 */
export function loadConfig(env: Environment): Config {
  const production = env.NODE_ENV === 'production'
  const faults: string[] = []
  const variables = readVariables(environmentReader(env, faults), production)
  const hasPooler = variables.pgPooler === 'transaction'
  // The lock of the migrations does not work through a pooler.
  const migrate = variables.migrate && !(hasPooler && !env.MIGRATE)
  const config: Config = { ...variables, migrate, production }
  faults.push(...storeFaults(env, production))
  faults.push(...threadFaults(env, config))
  if (hasPooler && migrate) faults.push('MIGRATE: is true; expected false with PG_POOLER=transaction')
  if (production) faults.push(...productionFaults(env, config))
  if (faults.length > 0) throw new ConfigError(faults)
  return Object.freeze(config)
}

function* storeFaults(env: Environment, production: boolean) {
  const unset = ['DATABASE_URL', 'REDIS_URL'].filter((name) => !env[name])
  if (unset.length === 0) return
  const alternative = production ? '' : ', or neither and `npm start` in a checkout, which brings its own stores'
  yield `${unset.join(', ')}: unset; expected the URLs of your Postgres and your Redis${alternative}`
}

function* threadFaults(env: Environment, { hashThreads, poolThreads }: Config) {
  // libuv takes an empty variable for 1.
  if (env.UV_THREADPOOL_SIZE === '') yield 'UV_THREADPOOL_SIZE: is empty; expected a number, or no variable'
  if (hashThreads > poolThreads) {
    yield `HASH_THREADS: ${hashThreads} is more than libuv's pool of ${poolThreads} threads can run; ` +
      `expected at most ${poolThreads}, or set UV_THREADPOOL_SIZE=${hashThreads} in the environment of the process`
  }
}

function* productionFaults(env: Environment, config: Config) {
  if (!env.SESSION_SECRET) yield `SESSION_SECRET: is unset; expected in production: ${secrets.expected}`
  if (!env.TRUST_PROXY) yield `TRUST_PROXY: is unset; expected in production: ${addressRanges.expected}`
  if (config.sms && !env.SMS_WEBHOOK_URL) yield 'SMS_WEBHOOK_URL: is unset; expected in production, unless SMS=off'
  const { hashMemoryKib, hashPasses } = config
  if (!owaspArgon2id.some(([kib, passes]) => hashMemoryKib >= kib && hashPasses >= passes)) {
    const list = owaspArgon2id.map(([kib, passes]) => `${kib} with ${passes}`).join(', ')
    yield `HASH_MEMORY_KIB, HASH_PASSES: ${hashMemoryKib} with ${hashPasses} is weaker than OWASP's argon2id list; ` +
      `expected in production at least one of: ${list}`
  }
}

/**
 * Reads the variable of `npm run migrate`.
 *
 * @throws {ConfigError}
 */
export function loadDatabaseUrl(env: Environment): string {
  const faults: string[] = []
  const databaseUrl = readDatabaseUrl(environmentReader(env, faults))
  if (!env.DATABASE_URL) faults.push(`DATABASE_URL: is unset; expected ${databaseUrlParser.expected}`)
  if (faults.length > 0) throw new ConfigError(faults)
  return databaseUrl
}
