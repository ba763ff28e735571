import type { FastifyBaseLogger } from 'fastify'
import { perNetwork } from '../codes/limits.js'
import type { Config } from '../config/config.js'
import { networksOf } from '../http/network.js'
import { Refusal } from '../outcomes.js'
import type { Limit, RateLimits } from '../stores/rate-limits.js'
import { bugLogger } from '../stores/store-unavailable.js'

const [tenMinutes, hour, day] = [600, 3_600, 86_400]

/**
 * The limits on failed logins. The braces put all keys of a mobile, or of a device, on one Cluster slot.
 *
 * @param deviceId of a device that knows the mobile
 */
export function loginLimits({ loginIpHourlyMax }: Config, mobile: string, address: string, deviceId?: string) {
  const mobileKey = `login_failures:{${mobile}}`
  const pairs = perNetwork('login_mobile_network', `${mobileKey}:`, 5, tenMinutes, address)
  // NIST SP 800-63B, section 3.2.2, asks for at most 100 in a row. A window that ends, instead of a lock, gives the owner the
  // account back after a day.
  const perMobile: Limit = { name: 'login_mobile', key: mobileKey, max: 100, seconds: day }
  const ofNetworks = perNetwork('login_network', 'login_failures:network:', loginIpHourlyMax, hour, address)
  const deviceKey = `login_failures:{device:${deviceId}}`
  const perDevice: Limit[] = [
    { name: 'login_device', key: deviceKey, max: 5, seconds: tenMinutes },
    { name: 'login_device', key: `${deviceKey}:day`, max: 20, seconds: day }
  ]
  const ofStrangers = [...pairs, perMobile, ...ofNetworks.filter(({ max }) => max > 0)]
  return {
    /** Every try consumes them, and a success refunds its own unit. */
    counted: deviceId === undefined ? ofStrangers : perDevice,
    /** For the mobile and a network. A success also clears their failures. */
    clearedBySuccess: pairs,
    /** For the mobile alone, and for the mobile and the networks of the reset. */
    clearedByReset: [...pairs, perMobile]
  }
}

/** Clears failed logins after a proof. If this fails, they count until their windows end. */
export const forgetFailures = (rateLimits: RateLimits, limits: Limit[], log: FastifyBaseLogger) =>
  rateLimits.clearFailures(limits).catch(bugLogger(log, 'failed logins could not be forgotten'))

/** Counts the logins in the hash queue of this instance: nothing else limits the successful ones of one account. */
export class LoginPlaces {
  private readonly taken = new Map<string, number>()

  /**
   * Takes one of 3 places of the mobile, and one of 20 of each network. Strangers cannot take those of devices that know the
   * mobile: these have others.
   *
   * @returns a function that gives them back
   * @throws {Refusal} if there is none
   */
  take(mobile: string, address: string, deviceId: string | undefined): () => void {
    const side = deviceId === undefined ? '' : 'device '
    const networks = networksOf(address).map(({ network, factor }) => ({ key: `${side}${network}`, max: 20 * factor }))
    const groups = [{ key: `${side}${mobile}`, max: 3 }, ...networks]
    const count = (key: string) => this.taken.get(key) ?? 0
    if (groups.some(({ key, max }) => count(key) >= max)) {
      throw new Refusal('too_many_requests', undefined, { retryAfterSeconds: 1 })
    }
    for (const { key } of groups) this.taken.set(key, count(key) + 1)
    return () => {
      for (const { key } of groups) count(key) > 1 ? this.taken.set(key, count(key) - 1) : this.taken.delete(key)
    }
  }
}
