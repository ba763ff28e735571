import { randomBytes } from 'node:crypto'
import { accessSync, constants } from 'node:fs'
import { isIP } from 'node:net'
import { availableParallelism } from 'node:os'
import { type Language, languages } from '../outcomes.js'
import { parseRedisUrl } from './redis-url.js'

export type Environment = Readonly<Record<string, string | undefined>>

/** What the service runs with. Each field is the environment variable of the same name; README.md lists them. */
export interface Config {
  readonly production: boolean
  readonly port: number
  readonly host: string
  readonly databaseUrl: string
  readonly redisUrl: string
  /** The first signs, all verify. */
  readonly sessionSecrets: readonly [string, ...string[]]
  readonly cookieSecure: boolean
  /** IP addresses and CIDRs of the proxies whose `X-Forwarded-*` headers count. */
  readonly trustProxy: readonly string[]
  /** Starts with a slash and ends without one; empty for the root. */
  readonly apiPrefix: string
  readonly legacyStatus: boolean
  readonly defaultLanguage: Language
  /** Characters. */
  readonly passwordMin: number
  /** Whether this service sends the codes; if not, another writes them to Redis. */
  readonly sms: boolean
  /** The wrong guesses that use a code up. */
  readonly smsCodeAttempts: number
  readonly smsCodeTtlS: number
  /** Seconds between two codes for a mobile; of this and of the four below 0 is no limit. */
  readonly smsResendS: number
  /** Codes for a mobile in 24 hours. */
  readonly smsDailyMax: number
  /** Codes in an hour: for an address, for the first seven digits of a mobile, for all. */
  readonly smsIpHourlyMax: number
  readonly smsPrefixHourlyMax: number
  readonly smsHourlyMax: number
  /** Where codes are posted; absent outside production, where they may stay in Redis and, embedded, in the log. */
  readonly smsWebhookUrl: string | undefined
  readonly smsWebhookSecret: string | undefined
  readonly hashMemoryKib: number
  readonly hashPasses: number
  readonly hashThreads: number
  readonly hashMaxWaitMs: number
  readonly pgPoolMax: number
  readonly storeTimeoutMs: number
  /** Whether `/docs` is served, a page on which the API can be tried. */
  readonly docs: boolean
  /** Where OpenTelemetry sends spans; absent: it is not loaded. */
  readonly otlpEndpoint: string | undefined
  /** Where Prometheus scrapes; absent: nowhere. */
  readonly metricsPort: number | undefined
  /** Between a signal and the end of service: the balancer's time to notice. */
  readonly shutdownDelayMs: number
  /** The longest that a shutdown may take, its delay not counted. */
  readonly shutdownTimeoutMs: number
  readonly logLevel: (typeof logLevels)[number]
  /** Whether `server.ts` applies pending migrations at start. */
  readonly migrate: boolean
  /** Whether the service brings its own stores, for a first look at it. */
  readonly embedded: boolean
}

/** A bad environment: the message has a line for each bad variable. */
export class ConfigError extends Error {
  override readonly name = 'ConfigError'

  constructor(readonly faults: readonly string[]) {
    super(`the environment is not usable:\n${faults.map((fault) => `  ${fault}`).join('\n')}`)
  }
}

const logLevels = ['fatal', 'error', 'warn', 'info', 'debug', 'trace', 'silent'] as const

/** The longest password, in characters: a bound on the work that a stranger can ask for (NIST SP 800-63B: at least 64). */
export const passwordMax = 128

/**
 * The argon2id settings of equal strength that OWASP's Password Storage Cheat Sheet lists, as [KiB, passes]
 * with one lane. A setting is strong enough if it is at least as large in both as one of them.
 */
export const owaspArgon2id = [
  [47_104, 1],
  [19_456, 2],
  [12_288, 3],
  [9_216, 4],
  [7_168, 5]
] as const

/** The largest body of a request: a sign-up with the longest password has less than 2 KiB. */
export const bodyMaxBytes = 4 * 1_024

/** How a variable is read. `parse` throws the value's fault. */
interface Variable<T> {
  expected: string
  parse(text: string): T
}

/** Only for values that may be printed. */
const fault = (text: string, what: string) => new Error(`${JSON.stringify(text.slice(0, 80))} ${what}`)

const integer = (min: number, max: number): Variable<number> => ({
  expected: `an integer from ${min} to ${max}`,
  parse(text) {
    if (!/^-?\d{1,15}$/.test(text)) throw fault(text, 'is not an integer')
    const value = Number(text)
    if (value < min || value > max) throw fault(text, 'is out of range')
    return value
  }
})

const oneOf = <const T extends string>(...values: readonly T[]): Variable<T> => ({
  expected: `one of ${values.join(', ')}`,
  parse(text) {
    const value = values.find((candidate) => candidate === text)
    if (value !== undefined) return value
    throw fault(text, 'is unknown')
  }
})

const flag: Variable<boolean> = {
  expected: 'true or false',
  parse(text) {
    if (text === 'true' || text === 'false') return text === 'true'
    throw fault(text, 'is neither')
  }
}

const hostName: Variable<string> = {
  expected: 'an IP address or a host name',
  parse(text) {
    if (isIP(text) !== 0 || /^(?!-)[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*$/.test(text)) return text
    throw fault(text, 'is not a host')
  }
}

const prefix: Variable<string> = {
  expected: 'a path such as /api/v1.0, or / for none',
  parse(text) {
    if (text === '/') return ''
    if (/^(\/[A-Za-z0-9._~-]+)+$/.test(text)) return text
    throw fault(text, 'is not a path')
  }
}

const addressRanges: Variable<readonly string[]> = {
  expected: 'IP addresses or CIDRs, separated by commas',
  parse(text) {
    const ranges = text.split(',').map((range) => range.trim())
    const bad = ranges.find((range) => {
      const [address = '', bits, ...rest] = range.split('/')
      const widest = { 0: -1, 4: 32, 6: 128 }[isIP(address)] ?? -1
      return (
        widest < 0 || rest.length > 0 || (bits !== undefined && !(/^\d{1,3}$/.test(bits) && Number(bits) <= widest))
      )
    })
    if (bad === undefined) return ranges
    throw fault(bad, 'is not an address range')
  }
}

/** A URL may hold a password, so none is ever printed. */
const url = (...schemes: string[]): Variable<string> => ({
  expected: `a URL that starts with ${schemes.map((scheme) => `${scheme}//`).join(' or ')}`,
  parse(text) {
    const parsed = URL.canParse(text) ? new URL(text) : undefined
    if (parsed === undefined) throw new Error('its value is not a URL')
    if (!schemes.includes(parsed.protocol)) throw new Error('its value has another scheme')
    // fetch refuses them, and would name them.
    if (parsed.protocol.startsWith('http') && (parsed.username || parsed.password))
      throw new Error('its value has credentials')
    return text
  }
})

const redisUrlVariable: Variable<string> = {
  expected:
    'redis:// or rediss://, a comma-separated list of them (Cluster), or redis+sentinel://host,host/master-name',
  parse(text) {
    parseRedisUrl(text)
    return text
  }
}

/** The shortest session secret, in characters: what @fastify/session asks for. */
const secretMin = 32

const secrets: Variable<readonly [string, ...string[]]> = {
  expected: `secrets of at least ${secretMin} characters each, separated by commas`,
  parse(text) {
    const [first = '', ...others] = text.split(',').map((secret) => secret.trim())
    const short = [first, ...others].findIndex((secret) => secret.length < secretMin)
    if (short < 0) return [first, ...others]
    throw new Error(`its secret ${short + 1} is too short`)
  }
}

const readableFile: Variable<string> = {
  expected: 'the path of a file that can be read',
  parse(text) {
    try {
      accessSync(text, constants.R_OK)
      return text
    } catch {
      throw fault(text, 'cannot be read')
    }
  }
}

/** Neither store is named, and this is not production: the service brings its own (`src/dev`). */
export function isEmbedded(env: Environment): boolean {
  return !env.DATABASE_URL && !env.REDIS_URL && env.NODE_ENV !== 'production'
}

/**
 * What `npm run migrate` needs.
 *
 * @throws {ConfigError}
 */
export function databaseUrlOf(env: Environment): string {
  const { read, faults } = reader(env)
  const databaseUrl = readDatabaseUrl(read)
  if (!env.DATABASE_URL) faults.push(`DATABASE_URL: is absent; expected ${databaseUrlVariable.expected}`)
  if (faults.length > 0) throw new ConfigError(faults)
  return databaseUrl
}

/** Gives the value of a variable; if it is absent, or bad, which is among the faults then, the other. */
type Read = <T>(name: string, variable: Variable<T>, whenAbsent: T) => T

function reader(env: Environment): { read: Read; faults: string[] } {
  const faults: string[] = []
  const read: Read = (name, variable, whenAbsent) => {
    const text = env[name]
    if (!text) return whenAbsent
    try {
      return variable.parse(text)
    } catch (error) {
      faults.push(`${name}: ${error instanceof Error ? error.message : error}; expected ${variable.expected}`)
      return whenAbsent
    }
  }
  return { read, faults }
}

const databaseUrlVariable = url('postgres:', 'postgresql:')

/** With the CA of libpq's variable, which node-postgres does not read. */
function readDatabaseUrl(read: Read): string {
  const text = read('DATABASE_URL', databaseUrlVariable, '')
  const rootCert = read('PGSSLROOTCERT', readableFile, '')
  if (!text || !rootCert) return text
  const databaseUrl = new URL(text)
  const { searchParams } = databaseUrl
  if (searchParams.has('sslmode') && !searchParams.has('sslrootcert')) searchParams.set('sslrootcert', rootCert)
  return databaseUrl.href
}

/**
 * Reads the configuration from environment variables. An empty variable counts as absent.
 *
 * @param embedded what the embedded stores add to the environment
 * @throws {ConfigError} which names every bad variable, its value's fault and what is expected, but prints no secret
 */
export function loadConfig(given: Environment, embedded?: Environment): Config {
  const env = { ...given, ...embedded }
  const { read, faults } = reader(env)

  const production = env.NODE_ENV === 'production'
  const databaseUrl = readDatabaseUrl(read)
  const redisUrl = read('REDIS_URL', redisUrlVariable, '')
  for (const [name, other] of [
    ['DATABASE_URL', 'REDIS_URL'],
    ['REDIS_URL', 'DATABASE_URL']
  ] as const) {
    if (env[name]) continue
    if (env[other]) faults.push(`${name}: is absent; expected with ${other}: set both, or neither for private servers`)
    else faults.push(`${name}: is absent; expected ${production ? 'in production' : 'here'}`)
  }

  const random = [randomBytes(secretMin).toString('base64url')] as const
  const sessionSecrets = read('SESSION_SECRET', secrets, random)
  if (production && !env.SESSION_SECRET) {
    faults.push(`SESSION_SECRET: is absent; expected in production: ${secrets.expected}`)
  }

  const hashMemoryKib = read('HASH_MEMORY_KIB', integer(8, 4_194_304), 19_456)
  const hashPasses = read('HASH_PASSES', integer(1, 1_000), 2)
  if (production && !owaspArgon2id.some(([kib, passes]) => hashMemoryKib >= kib && hashPasses >= passes)) {
    const list = owaspArgon2id.map(([kib, passes]) => `${kib} with ${passes}`).join(', ')
    faults.push(
      `HASH_MEMORY_KIB, HASH_PASSES: ${hashMemoryKib} with ${hashPasses} is weaker than OWASP's argon2id list; ` +
        `expected in production at least one of: ${list}`
    )
  }

  const sms = read('SMS', oneOf('on', 'off'), 'on') === 'on'
  const smsWebhookUrl = read<string | undefined>('SMS_WEBHOOK_URL', url('https:', 'http:'), undefined)
  if (production && sms && !env.SMS_WEBHOOK_URL) {
    faults.push('SMS_WEBHOOK_URL: is absent; expected in production, unless SMS=off')
  }

  const config: Config = {
    production,
    port: read('PORT', integer(0, 65_535), 3000),
    host: read('HOST', hostName, '127.0.0.1'),
    databaseUrl,
    redisUrl,
    sessionSecrets,
    cookieSecure: read('COOKIE_SECURE', flag, production),
    trustProxy: read('TRUST_PROXY', addressRanges, []),
    apiPrefix: read('API_PREFIX', prefix, '/api/v1.0'),
    legacyStatus: read('LEGACY_STATUS', flag, false),
    defaultLanguage: read('DEFAULT_LANGUAGE', oneOf(...languages), 'zh'),
    // NIST SP 800-63B asks for 8 at the least.
    passwordMin: read('PASSWORD_MIN', integer(production ? 8 : 1, passwordMax), 8),
    sms,
    smsCodeAttempts: read('SMS_CODE_ATTEMPTS', integer(1, 1_000), 1),
    smsCodeTtlS: read('SMS_CODE_TTL_S', integer(1, 86_400), 300),
    smsResendS: read('SMS_RESEND_S', integer(0, 86_400), 60),
    smsDailyMax: read('SMS_DAILY_MAX', integer(0, 1_000_000), 10),
    smsIpHourlyMax: read('SMS_IP_HOURLY_MAX', integer(0, 1_000_000_000), 20),
    smsPrefixHourlyMax: read('SMS_PREFIX_HOURLY_MAX', integer(0, 1_000_000_000), 200),
    smsHourlyMax: read('SMS_HOURLY_MAX', integer(0, 1_000_000_000), 0),
    smsWebhookUrl,
    smsWebhookSecret: env.SMS_WEBHOOK_SECRET || undefined,
    hashMemoryKib,
    hashPasses,
    hashThreads: read('HASH_THREADS', integer(1, 1_024), availableParallelism()),
    hashMaxWaitMs: read('HASH_MAX_WAIT_MS', integer(0, 600_000), 2_000),
    pgPoolMax: read('PG_POOL_MAX', integer(1, 1_000), 10),
    storeTimeoutMs: read('STORE_TIMEOUT_MS', integer(1, 60_000), 1_000),
    docs: read('DOCS', flag, !production),
    otlpEndpoint: read<string | undefined>('OTEL_EXPORTER_OTLP_ENDPOINT', url('https:', 'http:'), undefined),
    metricsPort: read<number | undefined>('METRICS_PORT', integer(0, 65_535), undefined),
    shutdownDelayMs: read('SHUTDOWN_DELAY_MS', integer(0, 600_000), 0),
    shutdownTimeoutMs: read('SHUTDOWN_TIMEOUT_MS', integer(1, 600_000), 15_000),
    logLevel: read('LOG_LEVEL', oneOf(...logLevels), 'info'),
    migrate: read('MIGRATE', flag, true),
    embedded: embedded !== undefined
  }
  if (faults.length > 0) throw new ConfigError(faults)
  return Object.freeze(config)
}
