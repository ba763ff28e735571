import ipaddr from 'ipaddr.js'

/** The port that some proxies write behind an address. */
const port = /(?<=^[\d.]+|^\[.*\]):\d+$/

/**
 * An address as throttles count it: of IPv6 the first 64 bits, which are one subscriber's (RFC 6177). All that is no
 * address, as a proxy may write what it does not know, counts as one.
 */
export function networkOf(address: string | undefined): string {
  const bare = (address ?? '').replace(port, '').replace(/^\[(.*)\]$/, '$1')
  if (!ipaddr.isValid(bare)) return 'unknown'
  const parsed = ipaddr.process(bare)
  if (!(parsed instanceof ipaddr.IPv6)) return parsed.toString()
  return `${parsed.parts
    .slice(0, 4)
    .map((part) => part.toString(16))
    .join(':')}::/64`
}
