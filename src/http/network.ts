import { isIPv4 } from 'node:net'
import ipaddr from 'ipaddr.js'

/** The port that some proxies append to an address. */
const port = /(?<=^[\d.]+|^\[.*\]):\d+$/

/** A network for which limits count. Its maximum is `share` times the configured number. */
export interface Network {
  network: string
  share: number
}

/** A site has up to 65,536 networks (RFC 6177), but few people. */
const sharePerSite = 4

/**
 * Returns the networks by which limits count an address: an IPv4 address itself; for IPv6 the /64, which belongs to one
 * subscriber (RFC 6177), and the /48 with four times the number. Anything else, such as a proxy's `unknown`, counts as one
 * network. A /64 in the form that this function returns gives the same networks as an address in it.
 */
export function networksOf(address: string | undefined): [Network, ...Network[]] {
  // The usual case needs no parser.
  if (address !== undefined && isIPv4(address)) return [{ network: address, share: 1 }]
  const bareAddress = (address ?? '')
    .replace(port, '')
    .replace(/^\[(.*)\]$/, '$1')
    .replace(/\/64$/, '')
  if (!ipaddr.isValid(bareAddress)) return [{ network: 'unknown', share: 1 }]
  const parsed = ipaddr.process(bareAddress)
  if (!(parsed instanceof ipaddr.IPv6)) return [{ network: parsed.toString(), share: 1 }]
  const prefix = (groups: number) =>
    `${parsed.parts
      .slice(0, groups)
      .map((part) => part.toString(16))
      .join(':')}::/${16 * groups}`
  return [
    { network: prefix(4), share: 1 },
    { network: prefix(3), share: sharePerSite }
  ]
}
