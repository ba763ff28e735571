import { isIP } from 'node:net'
import { parseRedisUrl } from './redis-url.js'

/** Turns the text of a variable into its value. */
export interface Parser<T> {
  /** Completes the sentence "expected …" of an error message. */
  readonly expected: string
  /** @throws {Error} whose message says what is wrong with the text; it never quotes a secret */
  parse(text: string): T
}

/** Quotes the text, so only for values that are not secret. */
const invalid = (text: string, problem: string) => new Error(`${JSON.stringify(text.slice(0, 80))} ${problem}`)

export const integer = (min: number, max: number): Parser<number> => ({
  expected: `an integer from ${min} to ${max}`,
  parse(text) {
    if (!/^-?\d{1,15}$/.test(text)) throw invalid(text, 'is not an integer')
    const value = Number(text)
    if (value < min || value > max) throw invalid(text, 'is out of range')
    return value
  }
})

export const oneOf = <const T extends string>(...values: readonly T[]): Parser<T> => ({
  expected: `one of ${values.join(', ')}`,
  parse(text) {
    const value = values.find((candidate) => candidate === text)
    if (value !== undefined) return value
    throw invalid(text, 'is not one of them')
  }
})

const flag = (on: string, off: string): Parser<boolean> => ({
  expected: `${on} or ${off}`,
  parse(text) {
    if (text === on || text === off) return text === on
    throw invalid(text, `is neither ${on} nor ${off}`)
  }
})

export const trueOrFalse = flag('true', 'false')
export const onOrOff = flag('on', 'off')

/** Any text, so it may hold a secret. */
export const anyText: Parser<string> = { expected: 'a text', parse: (value) => value }

export const hostName: Parser<string> = {
  expected: 'an IP address or a host name',
  parse(text) {
    if (isIP(text) !== 0 || /^(?!-)[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*$/.test(text)) return text
    throw invalid(text, 'is not a host')
  }
}

export const pathPrefix: Parser<string> = {
  expected: 'a path such as /api/v1.0, or / for none',
  parse(text) {
    if (text === '/') return ''
    if (/^(\/[A-Za-z0-9._~-]+)+$/.test(text)) return text
    throw invalid(text, 'is not a path')
  }
}

export const addressRanges: Parser<readonly string[]> = {
  expected: 'IP addresses or CIDRs, separated by commas, or none',
  parse(text) {
    if (text === 'none') return []
    const ranges = text.split(',').map((range) => range.trim())
    const bad = ranges.find((range) => !isAddressRange(range))
    if (bad === undefined) return ranges
    throw invalid(bad, 'is not an address range')
  }
}

function isAddressRange(range: string): boolean {
  const [address = '', prefixLength, ...rest] = range.split('/')
  const maxPrefixLength = { 4: 32, 6: 128 }[isIP(address)]
  if (maxPrefixLength === undefined || rest.length > 0) return false
  // @fastify/proxy-addr refuses a length of 0.
  return prefixLength === undefined || (/^[1-9]\d{0,2}$/.test(prefixLength) && Number(prefixLength) <= maxPrefixLength)
}

/** A URL may hold a password, so errors never quote it. */
export const url = (...schemes: string[]): Parser<string> => ({
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
