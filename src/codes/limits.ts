import type { Config } from '../config/config.js'
import { networksOf } from '../http/network.js'
import type { Limit, LimitName } from '../stores/rate-limits.js'

const [hour, day] = [3_600, 86_400]

const isEnabled = ({ max, seconds }: Limit) => max > 0 && seconds > 0

/** The limits of a mobile on messages. They are refunded if the message was certainly not sent. */
export function mobileLimits(config: Config, mobile: string): Limit[] {
  const limits: Limit[] = [
    // The key is a contract with other services.
    { name: 'sms_resend', key: `send_sms_code_${mobile}`, max: 1, seconds: config.smsResendS, isPlainKey: true },
    { name: 'sms_mobile', key: `sms_codes:mobile:${mobile}`, max: config.smsDailyMax, seconds: day }
  ]
  return limits.filter(isEnabled)
}

/** Returns one limit for each network that an address belongs to. */
export const perNetwork = (name: LimitName, prefix: string, max: number, seconds: number, address: string): Limit[] =>
  networksOf(address).map(({ network, factor }) => ({ name, key: `${prefix}${network}`, max: max * factor, seconds }))

/** The limits on messages whose codes nobody has used. They are against SMS pumping: attackers who earn money from each message. */
export function unusedCodeLimits(config: Config, mobile: string, address: string): Limit[] {
  const limits: Limit[] = [
    ...perNetwork('sms_network', 'sms_codes:network:', config.smsIpHourlyMax, hour, address),
    {
      name: 'sms_prefix',
      key: `sms_codes:prefix:${mobile.slice(0, 7)}`,
      max: config.smsPrefixHourlyMax,
      seconds: hour
    },
    { name: 'sms_all', key: 'sms_codes:all', max: config.smsHourlyMax, seconds: hour }
  ]
  return limits.filter(isEnabled)
}

/**
 * The limits on wrong codes over all mobiles, of a request without a ticket. Each code that is used refunds a unit of its network and of
 * all. The braces put all keys on one Cluster slot.
 */
export function guessLimits({ smsGuessIpHourlyMax, smsGuessHourlyMax }: Config, address: string): Limit[] {
  const limits: Limit[] = [
    ...perNetwork('guesses_network', '{sms_guesses}:network:', smsGuessIpHourlyMax, hour, address),
    { name: 'guesses_all', key: '{sms_guesses}:all', max: smsGuessHourlyMax, seconds: hour }
  ]
  return limits.filter(isEnabled)
}

/** A number of wrong codes for a mobile. */
export interface GuessBudget {
  name: LimitName
  /** The field of the hash with the guesses at the mobile. */
  field: string
  max: number
  windowMs: number
}

/** Wrong codes of a ticket count for twice its life, so that no difference between two clocks gives a second window. */
const ticketWindow = 2 * hour

/** What a /48 has of a budget for one mobile. A /48 may have 65,536 handsets, but few of them present codes of one mobile. */
const siteFactor = 4

/**
 * Returns the budgets that a wrong code costs. A guesser is a ticket, whose holder nobody else can block, or a network. All
 * without a ticket share one more budget.
 */
export function guessBudgets(
  { smsCodeAttempts, smsGuessDailyMax }: Config,
  ticketId: string | undefined,
  address: string
): GuessBudget[] {
  const perGuesser = (field: string, factor: number, seconds: number): GuessBudget => ({
    name: 'guesses_guesser',
    field,
    max: smsCodeAttempts * factor,
    windowMs: seconds * 1_000
  })
  if (ticketId !== undefined) return [perGuesser(`ticket:${ticketId}`, 1, ticketWindow)]
  const budgets = networksOf(address, siteFactor).map(({ network, factor }) => perGuesser(network, factor, hour))
  if (smsGuessDailyMax === 0) return budgets
  return [...budgets, { name: 'guesses_mobile', field: 'all', max: smsGuessDailyMax, windowMs: day * 1_000 }]
}
