import { randomUUID } from 'node:crypto'
import Fastify from 'fastify'
import t from 'tap'
import { type GuessBudget, guessBudgets, guessLimits, mobileLimits, unusedCodeLimits } from '#src/codes/limits.js'
import { createRateLimits, type Limit, type LimitName } from '#src/stores/rate-limits.js'
import { openRedis } from '#src/stores/redis.js'
import type { Observer } from '#src/telemetry/observer.js'
import { loginLimits } from '#src/users/login-limits.js'
import { startTestbed } from '../testkit/testbed.js'

/*
 * Every limit, and how limits count. test/sms-codes.test.ts, test/strangers.test.ts and test/logins.test.ts have the requests that
 * they refuse.
 */

const { config, redis } = await startTestbed(t)

const refusals: string[] = []
const observer = { onLimitReached: (limit: string) => refusals.push(limit) } as unknown as Observer

const app = Fastify()
t.teardown(() => app.close())
const store = await openRedis(app, config(), undefined)
const rateLimits = createRateLimits(store, observer)

t.test('G8: every limit has its key, its number and its window, and 0 is no limit', async (t) => {
  const defaults = config({ SMS_GUESS_IP_HOURLY_MAX: '50', SMS_GUESS_HOURLY_MAX: '1000' })
  const names = ['RESEND_S', 'DAILY_MAX', 'IP_HOURLY_MAX', 'PREFIX_HOURLY_MAX', 'HOURLY_MAX']
  const guesses = ['GUESS_DAILY_MAX', 'GUESS_IP_HOURLY_MAX', 'GUESS_HOURLY_MAX']
  const variables = [...names, ...guesses].map((name) => [`SMS_${name}`, '0'])
  const off = config({ ...Object.fromEntries(variables), LOGIN_IP_HOURLY_MAX: '0' })
  const [mobile, ipv4, ipv6] = ['13912345678', '192.0.2.1', '2001:db8:1:2::1']
  const [subnet, site] = ['2001:db8:1:2::/64', '2001:db8:1::/48']
  const describe = (limits: readonly (Limit | GuessBudget)[]) =>
    limits.map((limit) => {
      const [key, seconds] = 'key' in limit ? [limit.key, limit.seconds] : [limit.field, limit.windowMs / 1_000]
      return `${limit.name} ${key} ${limit.max}/${seconds}`
    })
  const check = (limits: readonly (Limit | GuessBudget)[], ...expected: string[]) =>
    t.strictSame(describe(limits), expected)

  check(
    [...mobileLimits(defaults, mobile), ...unusedCodeLimits(defaults, mobile, ipv4)],
    `sms_resend send_sms_code_${mobile} 1/60`,
    `sms_mobile sms_codes:mobile:${mobile} 10/86400`,
    `sms_network sms_codes:network:${ipv4} 20/3600`,
    'sms_prefix sms_codes:prefix:1391234 200/3600',
    'sms_all sms_codes:all 5000/3600'
  )
  check([...mobileLimits(off, mobile), ...unusedCodeLimits(off, mobile, ipv6)])

  const ofMobile = 'guesses_mobile all 50/86400'
  check(guessBudgets(defaults, 'id', ipv4), 'guesses_guesser ticket:id 5/7200')
  check(guessBudgets(defaults, undefined, ipv4), `guesses_guesser ${ipv4} 5/3600`, ofMobile)
  const ofNetworks = [`guesses_guesser ${subnet} 5/3600`, `guesses_guesser ${site} 20/3600`]
  check(guessBudgets(defaults, undefined, ipv6), ...ofNetworks, ofMobile)
  check(guessBudgets(off, undefined, ipv4), `guesses_guesser ${ipv4} 5/3600`)
  check(
    guessLimits(defaults, ipv6),
    `guesses_network {sms_guesses}:network:${subnet} 50/3600`,
    `guesses_network {sms_guesses}:network:${site} 3200/3600`,
    'guesses_all {sms_guesses}:all 1000/3600'
  )
  check(guessLimits(off, ipv6))

  const ofLogins = [
    `login_mobile_network login_failures:{${mobile}}:${ipv4} 5/600`,
    `login_mobile login_failures:{${mobile}} 100/86400`
  ]
  const logins = (of = defaults, device?: string) => loginLimits(of, mobile, ipv4, device).counted
  check(logins(), ...ofLogins, `login_network login_failures:network:${ipv4} 100/3600`)
  check(logins(off), ...ofLogins)
  const ofDevice = 'login_device login_failures:{device:id}'
  check(logins(defaults, 'id'), `${ofDevice} 5/600`, `${ofDevice}:day 20/86400`)
})

/** How much time may pass between two steps of a test, on a busy machine. */
const slackSeconds = 30

function newLimit(max: number, seconds: number, name: LimitName = 'sms_all', key = `limit:${randomUUID()}`): Limit {
  return { name, key, max, seconds }
}

const newPlainLimit = (seconds: number): Limit => ({ ...newLimit(1, seconds, 'sms_resend'), isPlainKey: true })

/** Consumes units of limits, one after the other. Returns the wait of the last one. */
async function consume(limits: readonly Limit[], count = 1): Promise<number> {
  let wait = 0
  for (let n = 0; n < count; n++) wait = await rateLimits.consume(limits, randomUUID())
  return wait
}

async function age({ key }: Limit, seconds: number): Promise<void> {
  for (const unit of await redis.zrange(key, '0', '-1')) await redis.zincrby(key, -1_000 * seconds, unit)
}

const counts = (limits: readonly Limit[]) => Promise.all(limits.map(({ key }) => redis.zcard(key)))

const isAbout = (seconds: number, expected: number) => seconds > expected - slackSeconds && seconds <= expected

t.test('at most so many units are consumed in any window, and the wait is until the oldest has left it', async (t) => {
  const limit = newLimit(3, 100)
  t.equal(await consume([limit]), 0)
  await age(limit, 60)
  t.equal(await consume([limit], 2), 0)
  t.ok(isAbout(await consume([limit]), 40), 'the first unit leaves in 40 s')
  await age(limit, 40)
  t.equal(await consume([limit]), 0, 'one unit has left, so there is room for one')
  t.ok(isAbout(await consume([limit]), 60), 'no boundary at which twice as many pass')
  t.ok(isAbout((await redis.pttl(limit.key)) / 1_000, 100), 'the key expires with its last unit')
  t.ok(isAbout(await consume([{ ...limit, max: 1 }]), 100), 'with a lower maximum, all units but none must leave')
})

t.test('if any limit is exhausted, none is consumed; the wait is the longest, and its limit is reported', async (t) => {
  for (const exhausted of [0, 1, 2]) {
    const limits = (['sms_mobile', 'sms_network', 'sms_all'] as const).map((name) => newLimit(2, 100, name))
    await consume(limits.slice(exhausted, exhausted + 1), 2)
    refusals.length = 0
    t.ok(isAbout(await consume(limits), 100))
    t.strictSame(refusals, [limits[exhausted]?.name])
    t.strictSame((await counts(limits)).toSpliced(exhausted, 1), [0, 0])
  }
  const limits = [newLimit(1, 80, 'sms_prefix'), newPlainLimit(140), newLimit(1, 200)]
  t.equal(await rateLimits.retryAfterSeconds(limits), 0)
  t.equal(await redis.exists(limits.map(({ key }) => key)), 0, 'a look consumes nothing')
  await consume(limits)
  for (const order of [limits, limits.toReversed()]) {
    refusals.length = 0
    t.ok(isAbout(await rateLimits.retryAfterSeconds(order), 200))
    t.strictSame(refusals, [], 'a look reports nothing')
    t.ok(isAbout(await consume(order), 200))
    t.strictSame(refusals, ['sms_all'])
  }
})

t.test('a plain key is a limit while it exists, whatever another service has written', async (t) => {
  const limit = newPlainLimit(70)
  t.equal(await consume([limit]), 0)
  t.ok(isAbout(await consume([limit]), 70))
  await redis.set(limit.key, 'sent', 'PX', 40_000)
  t.ok(isAbout(await consume([limit]), 40))
  await redis.set(limit.key, 'sent')
  t.equal(await consume([limit]), 70, 'without a TTL, for a whole window')
  await rateLimits.refund([limit], randomUUID())
  t.equal(await redis.get(limit.key), 'sent', 'the unit of another request is not refunded')
  await redis.del(limit.key)
  t.equal(await consume([limit]), 0)
})

t.test('a refund gives back the unit that was consumed, once, and no other', async (t) => {
  const [first, second, plain] = [newLimit(9, 100), newLimit(9, 100), newPlainLimit(100)]
  const limits = [first, second, plain]
  const unit = randomUUID()
  t.equal(await rateLimits.consume(limits, unit), 0)
  await consume([first, second])
  for (let n = 0; n < 2; n++) await rateLimits.refund(limits, unit)
  t.strictSame(await counts([first, second]), [1, 1])
  t.equal(await redis.exists(plain.key), 0)
})

t.test('a try that fails after its unit has expired adds no unit, and no key without a TTL', async (t) => {
  const [used, unused] = [newLimit(3, 100), newLimit(3, 100)]
  await consume([used])
  await rateLimits.markFailed([used, unused], 'expired')
  t.strictSame(await counts([used, unused]), [1, 0])
})

t.test('in a Cluster the limits of each slot are consumed in turn, and refunded if a later one fails', async (t) => {
  // One Redis in place of a Cluster. test/topologies.test.ts has a real one.
  const rateLimits = createRateLimits({ ...store, isCluster: true }, observer)
  const consume = (limits: readonly Limit[]) => rateLimits.consume(limits, randomUUID())
  const tag = randomUUID()
  const onSlot = (n: number) => newLimit(2, 300, 'login_mobile', `limit:{${tag}}:${n}`)
  const [before, first, after, second] = [newLimit(2, 300), onSlot(1), newLimit(2, 300), onSlot(2)]
  const limits = [before, first, after, second]
  t.equal(await consume(limits), 0)
  t.strictSame(await counts(limits), [1, 1, 1, 1])

  await consume([second])
  refusals.length = 0
  t.ok(isAbout(await consume(limits), 300), 'the limits of one slot are one group')
  t.strictSame(refusals, ['login_mobile'])
  t.strictSame(await counts(limits), [1, 1, 1, 2])
  t.ok(isAbout(await rateLimits.retryAfterSeconds(limits), 300))

  await redis.del(second.key)
  await consume([after])
  t.ok(isAbout(await consume(limits), 300))
  t.strictSame(await counts(limits), [1, 1, 2, 0])

  await redis.del(after.key)
  await redis.hset(after.key, 'no', 'limit')
  await t.rejects(consume(limits), { message: /WRONGTYPE/ })
  t.strictSame(await counts([before, first, second]), [1, 1, 0])
})
