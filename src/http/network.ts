import { isIPv4 } from 'node:net'
import type { onRequestHookHandler } from 'fastify'
import ipaddr from 'ipaddr.js'

/** Returns an address without the brackets and the port with which some proxies write it. */
export const bareAddress = (text: string) => text.replace(/^\[(.*)\](?::\d+)?$|^([\d.]+):\d+$/, '$1$2')

/** A network for which limits count. Its maximum is `factor` times the configured number. */
export interface Network {
  network: string
  factor: number
}

/** Where an IPv6 address has an IPv4 address, in bytes: mapped (RFC 4291), NAT64 (RFC 6052, 8215), SIIT (RFC 6145), 6to4 (RFC 3056). */
const ipv4Offsets: Partial<Record<string, number>> = { ipv4Mapped: 12, rfc6052: 12, rfc6145: 12, '6to4': 2 }

/**
 * Refuses a request whose connection was reset before it was read. It has no address, so all of them would be one network. Node.js
 * remembers an address that it has read, so a client that disconnects later keeps its own.
 */
export const requireAddress: onRequestHookHandler = (request, _reply, done) => {
  if (request.ip !== undefined) return done()
  done(Object.assign(new Error('the client disconnected'), { code: 'CLIENT_DISCONNECTED' }))
}

/**
 * Returns the networks by which limits count an address: an IPv4 address itself, also one inside an IPv6 address; for IPv6 the /64,
 * which belongs to one subscriber (RFC 6177), and the /48 with `siteFactor` times the number. Anything else, such as a proxy's `unknown`,
 * counts as one network. A /64 in the form that this function returns gives the same networks as an address in it.
 *
 * @param siteFactor by default 64: a mobile carrier's /48 holds up to 65,536 handsets
 */
export function networksOf(address: string, siteFactor = 64): [Network, ...Network[]] {
  // The usual case needs no parser.
  if (isIPv4(address)) return [{ network: address, factor: 1 }]
  const ip = bareAddress(address).replace(/\/64$/, '')
  if (!ipaddr.isValid(ip)) return [{ network: 'unknown', factor: 1 }]
  const parsed = ipaddr.parse(ip)
  if (!(parsed instanceof ipaddr.IPv6)) return [{ network: parsed.toString(), factor: 1 }]
  const offset = ipv4Offsets[parsed.range()]
  if (offset !== undefined) {
    const ipv4 = parsed.toByteArray().slice(offset, offset + 4)
    return [{ network: ipv4.join('.'), factor: 1 }]
  }
  const parts = parsed.parts.map((part) => part.toString(16))
  const prefix = (groups: number) => `${parts.slice(0, groups).join(':')}::/${16 * groups}`
  return [
    { network: prefix(4), factor: 1 },
    { network: prefix(3), factor: siteFactor }
  ]
}
