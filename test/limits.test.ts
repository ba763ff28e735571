import t from 'tap'
import { guessBudgets, guessLimits, mobileLimits, unusedCodeLimits } from '#src/codes/limits.js'
import { type Environment, loadConfig } from '#src/config/config.js'
import { loginLimits } from '#src/users/login-limits.js'

/*
 * Every limit with its key, its number and its window, as in docs/api.md and docs/guarantees.md. Other instances, and other
 * versions during an upgrade, count under the same keys. test/rate-limits.test.ts has how they count.
 */

const configWith = (env: Environment = {}) =>
  loadConfig({ DATABASE_URL: 'postgresql://u:p@host/db', REDIS_URL: 'redis://host', ...env })
const config = configWith()

const [hour, day] = [3_600, 86_400]
const mobile = '13912345678'
const ipv4 = '192.0.2.1'
const ipv6 = '2001:db8:1:2::1'
const [subnet, site] = ['2001:db8:1:2::/64', '2001:db8:1::/48']

t.test('the limits of a mobile on messages', async (t) => {
  t.strictSame(mobileLimits(config, mobile), [
    { name: 'sms_resend', key: `send_sms_code_${mobile}`, max: 1, seconds: 60, isPlainKey: true },
    { name: 'sms_mobile', key: `sms_codes:mobile:${mobile}`, max: 10, seconds: day }
  ])
  t.strictSame(mobileLimits(configWith({ SMS_RESEND_S: '0', SMS_DAILY_MAX: '0' }), mobile), [], '0 is no limit')
})

t.test('the limits on messages whose codes nobody has used', async (t) => {
  const shared = [
    { name: 'sms_prefix', key: 'sms_codes:prefix:1391234', max: 200, seconds: hour },
    { name: 'sms_all', key: 'sms_codes:all', max: 5_000, seconds: hour }
  ]
  t.strictSame(unusedCodeLimits(config, mobile, ipv4), [
    { name: 'sms_network', key: `sms_codes:network:${ipv4}`, max: 20, seconds: hour },
    ...shared
  ])
  t.strictSame(unusedCodeLimits(config, mobile, ipv6), [
    { name: 'sms_network', key: `sms_codes:network:${subnet}`, max: 20, seconds: hour },
    { name: 'sms_network', key: `sms_codes:network:${site}`, max: 1_280, seconds: hour },
    ...shared
  ])
  const off = { SMS_IP_HOURLY_MAX: '0', SMS_PREFIX_HOURLY_MAX: '0', SMS_HOURLY_MAX: '0' }
  t.strictSame(unusedCodeLimits(configWith(off), mobile, ipv6), [], '0 is no limit')
})

t.test('the budgets of wrong codes', async (t) => {
  const ofGuesser = (field: string, max = 5, hours = 1) => ({
    name: 'guesses_guesser',
    field,
    max,
    windowMs: hours * hour * 1_000
  })
  const ofAll = { name: 'guesses_mobile', field: 'all', max: 50, windowMs: day * 1_000 }
  t.strictSame(guessBudgets(config, 'id', ipv4), [ofGuesser('ticket:id', 5, 2)])
  t.strictSame(guessBudgets(config, undefined, ipv4), [ofGuesser(ipv4), ofAll])
  t.strictSame(guessBudgets(config, undefined, ipv6), [ofGuesser(subnet), ofGuesser(site, 20), ofAll])
  t.strictSame(guessBudgets(configWith({ SMS_GUESS_DAILY_MAX: '0' }), undefined, ipv4), [ofGuesser(ipv4)])
})

t.test('the limits on wrong codes over all mobiles', async (t) => {
  const perNetwork = (network: string, max = 50) => ({
    name: 'guesses_network',
    key: `{sms_guesses}:network:${network}`,
    max,
    seconds: hour
  })
  const all = { name: 'guesses_all', key: '{sms_guesses}:all', max: 1_000, seconds: hour }
  t.strictSame(guessLimits(config, ipv4), [perNetwork(ipv4), all])
  t.strictSame(guessLimits(config, ipv6), [perNetwork(subnet), perNetwork(site, 3_200), all])
  const off = { SMS_GUESS_IP_HOURLY_MAX: '0', SMS_GUESS_HOURLY_MAX: '0' }
  t.strictSame(guessLimits(configWith(off), ipv6), [], '0 is no limit')
})

t.test('the limits on failed logins', async (t) => {
  const pair = (network: string, max = 5) => ({
    name: 'login_mobile_network',
    key: `login_failures:{${mobile}}:${network}`,
    max,
    seconds: 600
  })
  const perMobile = { name: 'login_mobile', key: `login_failures:{${mobile}}`, max: 100, seconds: day }
  const perNetwork = (network: string, max = 100) => ({
    name: 'login_network',
    key: `login_failures:network:${network}`,
    max,
    seconds: hour
  })
  t.strictSame(loginLimits(config, mobile, ipv4), {
    counted: [pair(ipv4), perMobile, perNetwork(ipv4)],
    clearedBySuccess: [pair(ipv4)],
    clearedByReset: [pair(ipv4), perMobile]
  })
  t.strictSame(loginLimits(config, mobile, ipv6), {
    counted: [pair(subnet), pair(site, 320), perMobile, perNetwork(subnet), perNetwork(site, 6_400)],
    clearedBySuccess: [pair(subnet), pair(site, 320)],
    clearedByReset: [pair(subnet), pair(site, 320), perMobile]
  })
  const { counted } = loginLimits(configWith({ LOGIN_IP_HOURLY_MAX: '0' }), mobile, ipv4)
  t.strictSame(counted, [pair(ipv4), perMobile], '0 is no limit')
  t.strictSame(loginLimits(config, mobile, ipv4, 'id'), {
    counted: [
      { name: 'login_device', key: 'login_failures:{device:id}', max: 5, seconds: 600 },
      { name: 'login_device', key: 'login_failures:{device:id}:day', max: 20, seconds: day }
    ],
    clearedBySuccess: [pair(ipv4)],
    clearedByReset: [pair(ipv4), perMobile]
  })
})
