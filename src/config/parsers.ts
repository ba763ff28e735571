import { isIP } from 'node:net'
import { parseRedisUrl } from './redis-url.js'

/** Turns the text of a variable into its value. */
export interface Parser<T> {
  /** Completes the sentence "expected …" of an error message. */
  readonly expected: string
  /** @throws {Error} whose message says what is wrong with the text; it never quotes a secret */
  parse(text: string): T
}

/**
 * Parses values that are not secret: an error quotes them.
 *
 * @param read returns undefined for an invalid text
 */
const parser = <T>(expected: string, read: (text: string) => T | undefined): Parser<T> => ({
  expected,
  parse(text) {
    const value = read(text)
    if (value === undefined) throw new Error(`is ${JSON.stringify(text.slice(0, 80))}`)
    return value
  }
})

export const integer = (min: number, max: number) =>
  parser(`an integer from ${min} to ${max}`, (text) => {
    const value = /^-?\d{1,15}$/.test(text) ? Number(text) : Number.NaN
    return value >= min && value <= max ? value : undefined
  })

export const oneOf = <const T extends string>(...values: readonly T[]) =>
  parser(`one of ${values.join(', ')}`, (text) => values.find((value) => value === text))

const flag = (on: string, off: string) =>
  parser(`${on} or ${off}`, (text) => (text === on || text === off ? text === on : undefined))

export const trueOrFalse = flag('true', 'false')
export const onOrOff = flag('on', 'off')

/** Any text, so it may hold a secret. */
export const anyText: Parser<string> = { expected: 'a text', parse: (value) => value }

export const hostName = parser('an IP address or a host name', (text) =>
  isIP(text) !== 0 || /^(?!-)[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*$/.test(text) ? text : undefined
)

export const pathPrefix = parser('a path such as /api/v1.0, or / for none', (text) =>
  text === '/' ? '' : /^(\/[A-Za-z0-9._~-]+)+$/.exec(text)?.[0]
)

export const addressRanges = parser<readonly string[]>(
  'IP addresses or CIDRs, separated by commas, or none',
  (text) => {
    const ranges = text === 'none' ? [] : text.split(',').map((range) => range.trim())
    return ranges.every(isAddressRange) ? ranges : undefined
  }
)

function isAddressRange(range: string): boolean {
  const [address = '', prefixLength, ...rest] = range.split('/')
  const maxPrefixLength = { 4: 32, 6: 128 }[isIP(address)]
  if (maxPrefixLength === undefined || rest.length > 0) return false
  // @fastify/proxy-addr refuses a length of 0.
  return prefixLength === undefined || (/^[1-9]\d{0,2}$/.test(prefixLength) && Number(prefixLength) <= maxPrefixLength)
}

/** A URL may hold a password, so errors never quote it. */
const url = (...schemes: string[]): Parser<string> => ({
  expected: `a URL that starts with ${schemes.map((scheme) => `${scheme}//`).join(' or ')}`,
  parse(text) {
    const parsed = URL.canParse(text) ? new URL(text) : undefined
    if (parsed === undefined) throw new Error('the value is not a URL')
    if (!schemes.includes(parsed.protocol)) throw new Error('the value has another scheme')
    // Clients quote the URL in their errors.
    if (parsed.protocol.startsWith('http') && (parsed.username || parsed.password))
      throw new Error('the value has credentials')
    return text
  }
})

export const webUrl = url('https:', 'http:')

export const databaseUrl: Parser<string> = {
  expected: 'a URL that starts with postgres:// or postgresql://, with one host',
  parse(text) {
    // node-postgres looks such a list up as one name.
    if (/^\w+:\/\/([^/?#]*@)?[^/?#@]*,[^@]*$|[?&]host=[^&]*(,|%2C)/i.test(text))
      throw new Error('the value has more than one host')
    return url('postgres:', 'postgresql:').parse(text)
  }
}

export const redisUrl: Parser<string> = {
  expected:
    'redis:// or rediss://, a comma-separated list of them (Cluster), or redis+sentinel://host,host/master-name',
  parse(text) {
    parseRedisUrl(text)
    return text
  }
}

/** The shortest session secret, in characters: the minimum of @fastify/session. */
export const secretMinLength = 32

export const secrets: Parser<readonly [string, ...string[]]> = {
  expected: `secrets of at least ${secretMinLength} characters each, separated by commas`,
  parse(text) {
    const [first = '', ...others] = text.split(',').map((secret) => secret.trim())
    const shortIndex = [first, ...others].findIndex((secret) => secret.length < secretMinLength)
    if (shortIndex < 0) return [first, ...others]
    throw new Error(`secret number ${shortIndex + 1} is too short`)
  }
}
