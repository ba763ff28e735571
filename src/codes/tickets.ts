import { createHmac, hkdfSync, randomBytes, timingSafeEqual } from 'node:crypto'

/** How long a ticket is valid. The window of its wrong codes is longer: it allows `SMS_CODE_ATTEMPTS` in its whole life. */
const ttlMs = 3_600_000

/** The longest ticket in a request. */
export const ticketMaxLength = 256

/**
 * A ticket proves that the client that sends it has asked for the code. Its format is `<id>.<expiry>.<MAC>`; the expiry is in
 * ms since 1970, in base 36. Tickets are not stored.
 */
export class Tickets {
  private readonly keys

  /**
   * @param secrets the first one signs, all verify
   * @param purpose users/devices.ts has another one: its tokens are made in the same way
   */
  constructor(
    [newest, ...former]: readonly [string, ...string[]],
    purpose = 'ticket',
    private readonly lifeMs = ttlMs
  ) {
    const derive = (secret: string) => Buffer.from(hkdfSync('sha256', secret, '', `mobile-signup: ${purpose}`, 32))
    this.keys = [derive(newest), ...former.map(derive)] as const
  }

  issue(mobile: string, id = randomBytes(9).toString('base64url')): string {
    const claims = `${id}.${(Date.now() + this.lifeMs).toString(36)}`
    return `${claims}.${macOf(this.keys[0], mobile, claims).toString('base64url')}`
  }

  /** Returns the id of a ticket, or undefined if it is forged, expired or for another mobile. */
  verify(ticket: string, mobile: string): string | undefined {
    const [id = '', expiry = '', mac = ''] = ticket.split('.')
    const presented = Buffer.from(mac, 'base64url')
    const isGenuine = this.keys.some((key) => {
      const expected = macOf(key, mobile, `${id}.${expiry}`)
      return expected.length === presented.length && timingSafeEqual(expected, presented)
    })
    return isGenuine && Number.parseInt(expiry, 36) > Date.now() ? id : undefined
  }
}

const macOf = (key: Buffer, mobile: string, claims: string) =>
  createHmac('sha256', key).update(`${mobile}.${claims}`).digest()
