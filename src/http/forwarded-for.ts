import { isIP, isIPv6 } from 'node:net'
import fp from 'fastify-plugin'
import ipaddr from 'ipaddr.js'
import type { Config } from '../config/config.js'
import { sampler } from '../telemetry/sampled-warnings.js'

/** Returns an address as IPv6, in which an IPv4 address is the same as one that is mapped. */
const toIPv6 = (address: ipaddr.IPv4 | ipaddr.IPv6) =>
  address instanceof ipaddr.IPv4 ? address.toIPv4MappedAddress() : address

/** Returns a function that tells whether an address is that of a proxy that `TRUST_PROXY` names. Some proxies append a port. */
export function trustedProxies({ trustProxy }: Pick<Config, 'trustProxy'>) {
  const ranges = trustProxy.map((range): [ipaddr.IPv6, number] => {
    const [address = '', length = isIPv6(address) ? 128 : 32] = range.split('/')
    return [toIPv6(ipaddr.parse(address)), Number(length) + (isIPv6(address) ? 0 : 96)]
  })
  return function isTrusted(text: string | undefined): boolean {
    const address = text?.replace(/^\[(.*)\](?::\d+)?$|^([\d.]+):\d+$/, '$1$2') ?? ''
    if (isIP(address) === 0) return false
    const parsed = toIPv6(ipaddr.parse(address))
    return ranges.some(([network, length]) => parsed.match(network, length))
  }
}

/** Logs, at most once a minute each, an X-Forwarded-For that does not tell the client's address. */
export const forwardedFor = fp<{ config: Config }>(
  async (fastify, { config }) => {
    const isTrusted = trustedProxies(config)
    const sample = sampler(1, 60_000)
    fastify.addHook('onRequest', (request, _reply, done) => {
      if (request.headers['x-forwarded-for'] !== undefined) {
        const peer = request.socket.remoteAddress
        const fault = isTrusted(peer)
          ? isTrusted(request.ip) &&
            'every address of X-Forwarded-For is in TRUST_PROXY, so a client may have chosen its own'
          : 'X-Forwarded-For is ignored: TRUST_PROXY does not name this peer'
        if (fault && sample(fault) !== undefined) request.log.warn({ peer }, fault)
      }
      done()
    })
  },
  { fastify: '5.x', name: 'forwarded-for' }
)
