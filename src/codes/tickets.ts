import { createHmac, hkdfSync, randomBytes, timingSafeEqual } from 'node:crypto'

/**
 * How long a ticket is valid: as long as its wrong codes count, so that a ticket allows `SMS_CODE_ATTEMPTS` of them in its
 * whole life.
 */
const ttlMs = 3_600_000

/** The longest ticket in a request. */
export const ticketMaxLength = 256

/**
 * Tickets prove that the sender of a request is the one that asked for the code. A ticket is `<id>.<expiry>.<MAC>`, with the
 * expiry in ms since 1970 in base 36. Nothing of it is stored.
 */
export class Tickets {
  private readonly keys

  /** @param secrets the first one signs, all verify */
  constructor(secrets: readonly string[]) {
    this.keys = secrets.map((secret) => Buffer.from(hkdfSync('sha256', secret, '', 'mobile-signup: ticket', 32)))
  }

  issue(mobile: string): string {
    const claims = `${randomBytes(9).toString('base64url')}.${(Date.now() + ttlMs).toString(36)}`
    const [mac] = this.macs(mobile, claims)
    return `${claims}.${mac?.toString('base64url')}`
  }

  /** Returns the id of a ticket, or undefined if it is forged, expired or for another mobile. */
  verify(ticket: string, mobile: string): string | undefined {
    const [id = '', expiry = '', mac = ''] = ticket.split('.')
    const presented = Buffer.from(mac, 'base64url')
    const isGenuine = this.macs(mobile, `${id}.${expiry}`).some(
      (expected) => expected.length === presented.length && timingSafeEqual(expected, presented)
    )
    return isGenuine && Number.parseInt(expiry, 36) > Date.now() ? id : undefined
  }

  private macs(mobile: string, claims: string): Buffer[] {
    return this.keys.map((key) => createHmac('sha256', key).update(`${mobile}.${claims}`).digest())
  }
}
