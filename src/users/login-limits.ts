import type { Config } from '../config/config.js'
import { networksOf } from '../http/network.js'
import type { Limit } from '../stores/rate-limits.js'

/** Failed logins for one mobile from one network in ten minutes. */
const pairMax = 5
const pairSeconds = 600

/**
 * Failed logins for one mobile from all networks in an hour. NIST SP 800-63B, section 3.2.2, asks for at most 100 in a row.
 * A window that ends, instead of a lock, gives the owner the account back after an hour.
 */
const mobileMax = 100

const hour = 3_600

/** The limits on failed logins. The braces put all keys of a mobile on one Cluster slot. */
export function loginLimits({ loginIpHourlyMax }: Pick<Config, 'loginIpHourlyMax'>, mobile: string, address: string) {
  const networks = networksOf(address)
  const pairs: Limit[] = networks.map(({ network, share }) => ({
    name: 'login_mobile_network',
    key: `login_failures:{${mobile}}:${network}`,
    max: pairMax * share,
    seconds: pairSeconds
  }))
  const perMobile: Limit = { name: 'login_mobile', key: `login_failures:{${mobile}}`, max: mobileMax, seconds: hour }
  const perNetwork: Limit[] = networks.map(({ network, share }) => ({
    name: 'login_network',
    key: `login_failures:network:${network}`,
    max: loginIpHourlyMax * share,
    seconds: hour
  }))
  return {
    /** For the mobile and a network. */
    resetOnSuccess: pairs,
    /** For the mobile alone, and for a network alone. A success refunds only its own unit. */
    refundOnSuccess: loginIpHourlyMax > 0 ? [perMobile, ...perNetwork] : [perMobile],
    /** For the mobile alone, and for the mobile and the networks of the reset. */
    resetByPasswordReset: [...pairs, perMobile]
  }
}
