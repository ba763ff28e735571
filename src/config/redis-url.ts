import type { RedisOptions } from 'ioredis'

/** What a `REDIS_URL` names. */
export interface RedisTarget {
  /** One server, some nodes of a Cluster, or the sentinels that know where a master is. */
  readonly topology: 'single' | 'cluster' | 'sentinel'
  readonly nodes: readonly { host: string; port: number }[]
  /** Of Sentinel only. */
  readonly masterName: string | undefined
  /** Of the servers that have the keys: user name, password, database and, for `rediss`, TLS. */
  readonly options: Pick<RedisOptions, 'username' | 'password' | 'db' | 'tls'>
}

/**
 * Reads
 * - `redis://user:password@host:port/database`,
 * - `redis://user:password@host:port,host:port`, the nodes of a Cluster, each with its scheme or without,
 * - `redis+sentinel://user:password@host:port,host:port/master-name/database`.
 *
 * `rediss` in the place of `redis` is TLS. The user and the password are percent-encoded and stand before the first
 * host, for all.
 *
 * @throws {Error} with the fault, but nothing of the URL, which may hold a password
 */
export function parseRedisUrl(text: string): RedisTarget {
  const [scheme, tls, sentinel] = /^redis(s?)(\+sentinel)?:\/\//.exec(text) ?? []
  if (scheme === undefined) throw new Error('its value has another scheme')
  const addresses = text.split(',').map((address, n) => parseAddress(address, scheme, n === 0))
  const [first, last] = [addresses[0], addresses.at(-1)]
  const topology = sentinel ? 'sentinel' : addresses.length > 1 ? 'cluster' : 'single'

  const inside = addresses.slice(0, -1)
  if (inside.some(({ pathname }) => pathname !== '')) throw new Error('its value has a path before the last host')
  const path = (sentinel ? /^\/([^/]+)(?:\/(\d+))?$/ : /^()\/?(\d*)$/).exec(last?.pathname ?? '')
  if (path === null) {
    throw new Error(`its value has ${sentinel ? 'no master name' : 'more than a database number'} behind the hosts`)
  }
  const [, masterName = '', database = ''] = path
  if (topology === 'cluster' && Number(database) !== 0) throw new Error('its value has a database, but is a Cluster')
  const others = addresses.slice(1).filter(({ username, password }) => username || password)
  if (others.some(({ username, password }) => username !== first?.username || password !== first?.password)) {
    throw new Error('its value has other credentials behind the first host')
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

/** One host with what stands around it. */
function parseAddress(text: string, scheme: string, isFirst: boolean): URL {
  const withScheme = isFirst || text.startsWith(scheme) ? text : `${scheme}${text}`
  const url = URL.canParse(withScheme) ? new URL(withScheme) : undefined
  if (url === undefined || url.hostname === '') throw new Error('its value is not a URL')
  if (url.search || url.hash) throw new Error('its value has a query or a fragment')
  return url
}

function decode(text: string): string {
  try {
    return decodeURIComponent(text)
  } catch {
    throw new Error('its value is not percent-encoded')
  }
}
