/*
 * An import of the entry point. It keeps look-ups of names out of libuv's thread pool, whose threads hash. getaddrinfo() waits there
 * for 10 s or more if the name server is silent: two messages to such a webhook would hold up all sign-ups and logins.
 *
 * Names of /etc/hosts, and those for which the name server tells no address, still go to getaddrinfo(), which then does not wait.
 */
import dns from 'node:dns'
import { readFileSync } from 'node:fs'
import { isIP } from 'node:net'
import { networkInterfaces } from 'node:os'

/** A silent name server is asked for 0.5, 1 and 2 s. */
const patience = { timeout: 500, tries: 3 }

type Callback = (error: NodeJS.ErrnoException | null, ...result: (string | number | dns.LookupAddress[])[]) => void

const getaddrinfo = dns.lookup

// Sockets read this property for each connection.
Object.defineProperty(dns, 'lookup', { value: lookup })

function lookup(name: string, given: dns.LookupOptions | number | Callback, last?: Callback): void {
  const options = typeof given === 'object' ? given : { family: typeof given === 'number' ? given : 0 }
  const callback = typeof given === 'function' ? given : (last ?? (() => undefined))
  const ask = () => getaddrinfo(name, options, callback)
  // Sockets give the hint ADDRCONFIG.
  if ((options.hints ?? 0) & ~dns.ADDRCONFIG || isIP(name) || isLocal(name)) {
    ask()
    return
  }
  resolve(name, options).then(
    ([first, ...others]) => {
      if (first === undefined) ask()
      else if (options.all) callback(null, [first, ...others])
      else callback(null, first.address, first.family)
    },
    (error) => callback(error)
  )
}

/** Returns no address if the name server tells none. @throws if it does not answer */
async function resolve(name: string, { family, hints = 0, order }: dns.LookupOptions): Promise<dns.LookupAddress[]> {
  // A new resolver for each look-up: a resolver reads /etc/resolv.conf once, and the file may change.
  const resolver = new dns.promises.Resolver(patience)
  const hosts = Object.values(networkInterfaces()).flatMap((addresses) => addresses ?? [])
  const mayUse = (version: 4 | 6) =>
    !`${family}`.includes(version === 4 ? '6' : '4') &&
    (!(hints & dns.ADDRCONFIG) || hosts.some((host) => !host.internal && host.family === `IPv${version}`))
  // IPv4 first: more hosts lack a route for IPv6.
  const versions = ([4, 6] as const).filter(mayUse)
  if ((order ?? dns.getDefaultResultOrder()) === 'ipv6first') versions.reverse()
  for (const candidate of candidatesOf(name)) {
    const results = await Promise.allSettled(
      versions.map(async (version) => {
        const addresses = await (version === 4 ? resolver.resolve4(candidate) : resolver.resolve6(candidate))
        return addresses.map((address) => ({ address, family: version }))
      })
    )
    const addresses = results.flatMap((result) => (result.status === 'fulfilled' ? result.value : []))
    if (addresses.length > 0) return addresses
    for (const result of results) {
      if (result.status === 'rejected' && result.reason.code === 'ETIMEOUT') throw result.reason
    }
  }
  return []
}

/** Returns the names that getaddrinfo() would ask for, in its order (resolv.conf(5)). */
function candidatesOf(name: string): string[] {
  const config = read('/etc/resolv.conf')
  const [, domains = ''] = [...config.matchAll(/^(?:search|domain)\s+(.*)/gm)].at(-1) ?? []
  const [, ndots = 1] = /^options\b.*\bndots:(\d+)/m.exec(config) ?? []
  if (name.endsWith('.')) return [name]
  const longer = domains.split(/\s+/).flatMap((domain) => (domain ? [`${name}.${domain}`] : []))
  return name.split('.').length > Number(ndots) ? [name, ...longer] : [...longer, name]
}

function isLocal(name: string): boolean {
  const names = read('/etc/hosts').replace(/#.*/g, '').toLowerCase().split(/\s+/)
  return /(^|\.)localhost\.?$/i.test(name) || names.includes(name.toLowerCase())
}

function read(file: string): string {
  try {
    return readFileSync(file, 'utf8')
  } catch {
    return ''
  }
}
