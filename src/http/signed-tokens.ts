import { createHmac, hkdfSync, randomBytes, timingSafeEqual } from 'node:crypto'

/**
 * A token proves something about a mobile to whoever has the secrets. Its format is `<id>.<expiry>.<MAC>`; the expiry is in ms since
 * 1970, in base 36. Tokens are not stored.
 */
export class SignedTokens {
  private readonly keys

  /**
   * @param secrets the first one signs, all verify
   * @param purpose tokens for another purpose are not valid
   */
  constructor(
    [newest, ...former]: readonly [string, ...string[]],
    purpose: 'ticket' | 'device',
    private readonly lifeMs: number
  ) {
    const derive = (secret: string) => Buffer.from(hkdfSync('sha256', secret, '', `mobile-signup: ${purpose}`, 32))
    this.keys = [derive(newest), ...former.map(derive)] as const
  }

  issue(mobile: string, id = randomBytes(9).toString('base64url')): string {
    const claims = `${id}.${(Date.now() + this.lifeMs).toString(36)}`
    return `${claims}.${macOf(this.keys[0], mobile, claims).toString('base64url')}`
  }

  /** Returns the id of a token, or undefined if it is forged, expired or for another mobile. */
  verify(token: string, mobile: string): string | undefined {
    const [id = '', expiry = '', mac = ''] = token.split('.')
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
