import ipaddr from 'ipaddr.js'

/** An address as throttles count it: of IPv6 the first 64 bits, which are one subscriber's (RFC 6177). */
export function networkOf(address: string): string {
  const parsed = ipaddr.process(address)
  if (!(parsed instanceof ipaddr.IPv6)) return parsed.toString()
  return `${parsed.parts
    .slice(0, 4)
    .map((part) => part.toString(16))
    .join(':')}::/64`
}
