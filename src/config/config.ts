import { randomBytes } from 'node:crypto'
import { availableParallelism } from 'node:os'
import { languages } from '../outcomes.js'
import {
  addressRanges,
  anyText,
  databaseUrl,
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
  webUrl
} from './parsers.js'

export type Environment = Readonly<Record<string, string | undefined>>

/** What the service runs with, frozen. `readVariables` says what each field means. */
export type Config = Readonly<ReturnType<typeof readVariables>> & {
  /** `NODE_ENV` is `production`. */
  readonly production: boolean
}

/** The greatest cost of an argon2 hash that a login verifies. More would take the memory of the instance, or a thread for seconds. */
export const argon2Max = { memoryKib: 262_144, passes: 10 }

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
 * @param meaning completes its row in docs/operating.md
 * @param shownDefault replaces a default value that the page cannot show
 * @returns the parsed value, or `whenAbsent` if the variable is unset, empty or invalid
 */
type Read = <T>(name: string, parser: Parser<T>, whenAbsent: T, meaning: string, shownDefault?: string) => T

/** Every variable but NODE_ENV: its field, name, parser, default and meaning. docs/operating.md lists the same. */
export function readVariables(read: Read, production: boolean) {
  const limit = (name: string, max: number, meaning: string) => read(name, integer(0, 1_000_000_000), max, meaning)
  const optional = <T>(name: string, parser: Parser<T>, meaning: string) =>
    read<T | undefined>(name, parser, undefined, meaning)
  return {
    port: read('PORT', integer(0, 65_535), 3000, 'Listening port; 0 takes a free one.'),
    host: read('HOST', hostName, '127.0.0.1', 'Listening address.'),
    databaseUrl: read('DATABASE_URL', databaseUrl, '', 'See [stores](#stores).'),
    redisUrl: read('REDIS_URL', redisUrl, '', 'See [stores](#stores).'),
    /** The first one signs, all of them verify. */
    sessionSecrets: read<readonly [string, ...string[]]>(
      'SESSION_SECRET',
      secrets,
      [randomBytes(secretMinLength).toString('base64url')],
      `Signs cookies and tickets; at least ${secretMinLength} characters. Of several, separated by commas, the first signs and all verify.`,
      'random'
    ),
    cookieSecure: read('COOKIE_SECURE', trueOrFalse, production, 'Cookies have `Secure` and the prefix `__Host-`.'),
    trustProxy: read<readonly string[]>(
      'TRUST_PROXY',
      addressRanges,
      [],
      'Addresses and CIDRs of your proxies, separated by commas, or `none`: see [start](#start).',
      'none'
    ),
    /** Starts with a slash and ends without one; empty for the root. */
    apiPrefix: read('API_PREFIX', pathPrefix, '/api/v1.0', 'Path before all routes; `/` for none.'),
    legacyStatus: read('LEGACY_STATUS', trueOrFalse, false, 'Status 200 for all but probes, as in the Flask handler.'),
    defaultLanguage: read('DEFAULT_LANGUAGE', oneOf(...languages), 'zh', '`zh` or `en`, if a client chooses neither.'),
    /** In code points. */
    passwordMin: read(
      'PASSWORD_MIN',
      integer(production ? productionPasswordMin : 1, passwordMax),
      8,
      `Minimum length; at least ${productionPasswordMin} in production.`
    ),
    /** Whether this service sends the codes. If not, another service writes them to Redis. */
    sms: read('SMS', onOrOff, true, '`off`: another service sends codes; `POST /sms_codes` is absent.', 'on'),
    smsWebhookUrl: optional('SMS_WEBHOOK_URL', webUrl, 'Receives each code. Unset: nothing is sent.'),
    smsWebhookSecret: optional('SMS_WEBHOOK_SECRET', anyText, 'Signs requests to [the webhook](#the-sms-webhook).'),
    eventsWebhookUrl: optional('EVENTS_WEBHOOK_URL', webUrl, 'Receives [events](#events). Unset: none are written.'),
    eventsWebhookSecret: optional('EVENTS_WEBHOOK_SECRET', anyText, 'Signs requests to that webhook.'),
    smsCodeTtlS: read(
      'SMS_CODE_TTL_S',
      integer(1, production ? productionCodeTtlMaxS : day),
      300,
      `TTL of a code; at most ${productionCodeTtlMaxS} in production.`
    ),
    smsResendS: read('SMS_RESEND_S', integer(0, day), 60, 'Wait between messages to a mobile.'),
    smsDailyMax: limit('SMS_DAILY_MAX', 10, 'Messages to a mobile.'),
    smsIpHourlyMax: limit('SMS_IP_HOURLY_MAX', 20, 'Unused codes for a network.'),
    smsPrefixHourlyMax: limit('SMS_PREFIX_HOURLY_MAX', 200, 'Unused codes for the first seven digits of a mobile.'),
    smsHourlyMax: limit('SMS_HOURLY_MAX', 5_000, 'Unused codes in all.'),
    smsCodeAttempts: read('SMS_CODE_ATTEMPTS', integer(1, 1_000), 5, 'Wrong codes for a mobile by ticket or network.'),
    smsGuessDailyMax: limit('SMS_GUESS_DAILY_MAX', 50, 'Wrong codes for a mobile without a ticket.'),
    smsGuessIpHourlyMax: limit('SMS_GUESS_IP_HOURLY_MAX', 50, 'Wrong codes without a ticket, of a network.'),
    smsGuessHourlyMax: limit('SMS_GUESS_HOURLY_MAX', 1_000, 'Wrong codes without a ticket, in all.'),
    loginIpHourlyMax: limit('LOGIN_IP_HOURLY_MAX', 100, 'Failed logins from a network.'),
    hashMemoryKib: read(
      'HASH_MEMORY_KIB',
      integer(8, argon2Max.memoryKib),
      12_288,
      "Memory of a hash. Production refuses settings weaker than [OWASP's list](https://cheatsheetseries.owasp.org/cheatsheets/Password_Storage_Cheat_Sheet.html)."
    ),
    hashPasses: read('HASH_PASSES', integer(1, argon2Max.passes), 3, 'Passes over that memory.'),
    ...readThreads(read),
    hashMaxWaitMs: read('HASH_MAX_WAIT_MS', integer(0, 600_000), 2_000, 'Longest wait for a hash; above, 503 `4500`.'),
    pgPooler: read('PG_POOLER', oneOf('none', 'transaction'), 'none', '`transaction` behind a [pooler](#poolers).'),
    pgPoolMax: read('PG_POOL_MAX', integer(1, 1_000), 10, 'Connections to Postgres.'),
    storeTimeoutMs: read('STORE_TIMEOUT_MS', integer(1, 60_000), 1_000, 'Timeout of each round trip to a store.'),
    docs: read('DOCS', trueOrFalse, !production, 'Serves `/docs`, where you try the API.'),
    metricsPort: optional('METRICS_PORT', integer(0, 65_535), 'Port of `/metrics`; 0: a free one. Unset: no metrics.'),
    otlpEndpoint: optional('OTEL_EXPORTER_OTLP_ENDPOINT', webUrl, 'Where [spans](#traces) go. Unset: no tracing.'),
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
      'How long an idle connection stays open: longer than [the gateway](#the-gateway) keeps it.'
    ),
    shutdownDelayMs: read('SHUTDOWN_DELAY_MS', integer(0, 600_000), 0, 'Pause before [the shutdown](#stop).'),
    shutdownTimeoutMs: read(
      'SHUTDOWN_TIMEOUT_MS',
      integer(1, 600_000),
      15_000,
      'Longest shutdown after that; at least `HASH_MAX_WAIT_MS` + 5 × `STORE_TIMEOUT_MS`.'
    ),
    migrate: read('MIGRATE', trueOrFalse, true, 'A start applies migrations. The default behind a pooler is false.')
  }
}

/** Returns the names of the limits on strangers that are 0. */
export const limitsTurnedOff = (config: Config) =>
  Object.entries(config).flatMap(([field, max]) =>
    max === 0 && /^(sms|login)/.test(field) ? field.replace(/[A-Z]/g, '_$&').toUpperCase() : []
  )

/** The size of libuv's thread pool, unless the environment sets it. */
const defaultPoolThreads = 4

/** Reads how many threads libuv's pool has, and how many of them may hash at a time. */
function readThreads(read: Read) {
  const poolThreads = read(
    'UV_THREADPOOL_SIZE',
    integer(1, 1_024),
    defaultPoolThreads,
    "Threads of libuv's pool. See [sizing](#sizing).",
    `\`HASH_THREADS\`; before Node.js 24.3: ${defaultPoolThreads}`
  )
  const hashThreads = read(
    'HASH_THREADS',
    integer(1, 1_024),
    Math.min(availableParallelism(), poolThreads),
    'Hashes at a time.',
    'cores, at most `UV_THREADPOOL_SIZE`'
  )
  return { poolThreads, hashThreads }
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
  const url = environmentReader(env, faults)('DATABASE_URL', databaseUrl, '', '')
  if (!env.DATABASE_URL) faults.push(`DATABASE_URL: is unset; expected ${databaseUrl.expected}`)
  if (faults.length > 0) throw new ConfigError(faults)
  return url
}
