import type { RedisOptions } from 'ioredis'

/** The Redis that a `REDIS_URL` names. */
export interface RedisTarget {
  /** One server, some nodes of a Cluster, or sentinels that know the address of a master. */
  readonly topology: 'single' | 'cluster' | 'sentinel'
  readonly nodes: readonly { host: string; port: number }[]
  /** Only for Sentinel. */
  readonly masterName: string | undefined
  /** Of the servers that hold the keys: user name, password, database and, for `rediss`, TLS. */
  readonly options: Pick<RedisOptions, 'username' | 'password' | 'db' | 'tls'>
}

/**
 * Parses one of
 * - `redis://user:password@host:port/database`,
 * - `redis://user:password@host:port,host:port`: nodes of a Cluster, each with or without its scheme,
 * - `redis+sentinel://user:password@host:port,host:port/master-name/database`.
 *
 * `rediss` instead of `redis` means TLS. User and password are percent-encoded, stand before the first host and count
 * for all hosts.
 *
 * @throws {Error} that says what is wrong but quotes nothing of the URL, which may hold a password
 */
export function parseRedisUrl(text: string): RedisTarget {
  const [scheme, tls, sentinel] = /^redis(s?)(\+sentinel)?:\/\//.exec(text) ?? []
  if (scheme === undefined) throw new Error('the value has another scheme')
  const addresses = text.split(',').map((address, index) => parseAddress(address, scheme, index === 0))
  const [first, last] = [addresses[0], addresses.at(-1)]
  const ofServers = addresses.length > 1 ? 'cluster' : 'single'
  const topology = sentinel ? 'sentinel' : ofServers

  const allButLast = addresses.slice(0, -1)
  if (allButLast.some(({ pathname }) => pathname !== '')) throw new Error('the value has a path before the last host')
  const path = (sentinel ? /^\/([^/]+)(?:\/(\d+))?$/ : /^()\/?(\d*)$/).exec(last?.pathname ?? '')
  if (path === null) {
    throw new Error(`the value has ${sentinel ? 'no master name' : 'more than a database number'} after the hosts`)
  }
  const [, masterName = '', database = ''] = path
  if (topology === 'cluster' && Number(database) !== 0)
    throw new Error('the value has a database, which a Cluster lacks')
  const withCredentials = addresses.slice(1).filter(({ username, password }) => username || password)
  if (withCredentials.some(({ username, password }) => username !== first?.username || password !== first?.password)) {
    throw new Error('the value has different credentials for several hosts')
  }

  const [username, password] = [decode(first?.username ?? ''), decode(first?.password ?? '')]
  return {
    topology,
    nodes: addresses.map(({ hostname, port }) => ({
      host: hostname.replace(/^\[(.*)\]$/, '$1'),
      port: Number(port || (sentinel ? 26_379 : 6_379))
    })),
    masterName: sentinel ? decode(masterName) : undefined,
    options: {
      db: Number(database),
      ...(username && { username }),
      ...(password && { password }),
      ...(tls && { tls: {} })
    }
  }
}

/** Parses one host with its optional scheme, credentials, port and path. */
function parseAddress(text: string, scheme: string, isFirst: boolean): URL {
  const withScheme = isFirst || text.startsWith(scheme) ? text : `${scheme}${text}`
  const url = URL.canParse(withScheme) ? new URL(withScheme) : undefined
  if (url === undefined || url.hostname === '') throw new Error('the value is not a URL')
  if (url.search || url.hash) throw new Error('the value has a query or a fragment')
  return url
}

function decode(text: string): string {
  try {
    return decodeURIComponent(text)
  } catch {
    throw new Error('the value is not percent-encoded')
  }
}
