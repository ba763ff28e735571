import ipaddr from 'ipaddr.js'

/** The port that some proxies append to an address. */
const port = /(?<=^[\d.]+|^\[.*\]):\d+$/

/**
 * Returns the network by which limits count an address: an IPv4 address itself, or the /64 of an IPv6 address, which
 * belongs to one subscriber (RFC 6177). Anything else, such as a proxy's `unknown`, counts as one network.
 */
export function networkOf(address: string | undefined): string {
  const bareAddress = (address ?? '').replace(port, '').replace(/^\[(.*)\]$/, '$1')
  if (!ipaddr.isValid(bareAddress)) return 'unknown'
  const parsed = ipaddr.process(bareAddress)
  if (!(parsed instanceof ipaddr.IPv6)) return parsed.toString()
  return `${parsed.parts
    .slice(0, 4)
    .map((part) => part.toString(16))
    .join(':')}::/64`
}
