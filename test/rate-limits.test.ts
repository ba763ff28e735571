import { randomUUID } from 'node:crypto'
import Fastify from 'fastify'
import t, { type Test } from 'tap'
import { type Limit, type LimitName, rateLimits as rateLimitsPlugin } from '../dist/stores/rate-limits.js'
import { redis as redisPlugin } from '../dist/stores/redis.js'
import { startTestbed } from '../testkit/testbed.js'

/*
 * What the limits leave in Redis, and how long a refused request must wait. test/sms-codes.test.ts and test/logins.test.ts
 * have the limits on messages and logins.
 */

const { config, redis } = await startTestbed(t)

const refusals: string[] = []
const observer = {
  onRoundTrip: () => undefined,
  onHash: () => undefined,
  onCodeSent: () => undefined,
  onCodeUsed: () => undefined,
  onLimitReached: (limit: string) => refusals.push(limit)
}

const app = Fastify()
t.teardown(() => app.close())
await app.register(redisPlugin, { config: config(), observer })
await app.register(rateLimitsPlugin, { observer })
const { rateLimits } = app

/** How much of a TTL may have passed until a test reads it, on a busy machine. */
const slackSeconds = 30

function newLimit(max: number, seconds: number, name: LimitName = 'sms_all', key = `limit:${randomUUID()}`): Limit {
  return { name, key, max, seconds }
}

const counts = (limits: readonly Limit[]) => redis.mget(limits.map(({ key }) => key))

const isAbout = (seconds: number, expected: number) => seconds > expected - slackSeconds && seconds <= expected

async function checkTtl(t: Test, { key }: Limit, seconds: number): Promise<void> {
  const ttlMs = await redis.pttl(key)
  t.ok(isAbout(ttlMs / 1_000, seconds), `${ttlMs} ms of ${seconds} s`)
}

t.test('each limit has its own window, which begins with its first unit', async (t) => {
  const [first, second, third] = [newLimit(2, 100), newLimit(3, 200), newLimit(4, 300)]
  const limits = [first, second, third]
  t.equal(await rateLimits.consume(limits), 0)
  t.strictSame(await counts(limits), ['1', '1', '1'])
  for (const limit of limits) await checkTtl(t, limit, limit.seconds)

  await redis.pexpire(first.key, 50_000)
  t.equal(await rateLimits.consume(limits), 0)
  t.strictSame(await counts(limits), ['2', '2', '2'])
  await checkTtl(t, first, 50)
  t.equal(await rateLimits.consume([second, third]), 0)
  t.equal(await rateLimits.consume([third]), 0)
  t.strictSame(await counts(limits), ['2', '3', '4'])
})

t.test('if any limit is exhausted, none is consumed; the wait is the longest, and its limit is reported', async (t) => {
  const names: LimitName[] = ['sms_resend', 'sms_mobile', 'sms_network']
  for (const exhausted of names) {
    const limits = names.map((name) => newLimit(5, 100, name))
    const before = limits.map(({ name }) => (name === exhausted ? '5' : null))
    for (const { name, key } of limits) if (name === exhausted) await redis.set(key, 5, 'PX', 80_000)
    refusals.length = 0
    t.ok(isAbout(await rateLimits.consume(limits), 80))
    t.strictSame(refusals, [exhausted])
    t.strictSame(await counts(limits), before)
  }

  const [short, long] = [newLimit(5, 300, 'sms_prefix'), newLimit(5, 300, 'sms_all')]
  await redis.set(short.key, 7, 'PX', 80_000)
  await redis.set(long.key, 5, 'PX', 200_000)
  for (const limits of [
    [short, long],
    [long, short]
  ]) {
    refusals.length = 0
    t.ok(isAbout(await rateLimits.consume(limits), 200))
    t.strictSame(refusals, ['sms_all'])
    t.ok(isAbout(await rateLimits.retryAfterSeconds(limits), 200))
  }
})

t.test('a look consumes nothing and reports nothing', async (t) => {
  const [used, unused] = [newLimit(2, 100), newLimit(2, 100)]
  t.equal(await rateLimits.consume([used]), 0)
  refusals.length = 0
  t.equal(await rateLimits.retryAfterSeconds([used, unused]), 0)
  t.strictSame(await counts([used, unused]), ['1', null])
  t.equal(await rateLimits.consume([used]), 0)
  t.ok(isAbout(await rateLimits.retryAfterSeconds([unused, used]), 100))
  t.strictSame(await counts([used, unused]), ['2', null])
  t.strictSame(refusals, [])
})

t.test('a counter that is not a number counts as exhausted; without a TTL, for a whole window', async (t) => {
  const [other, limit] = [newLimit(9, 500), newLimit(5, 70)]
  for (const [value, wait] of [
    ['sent', 70],
    ['5', 70],
    ['4', 0]
  ] as const) {
    await redis.set(limit.key, value)
    t.equal(await rateLimits.consume([other, limit]), wait, value)
  }
  await redis.set(limit.key, 'sent', 'PX', 60_000)
  t.ok(isAbout(await rateLimits.consume([other, limit]), 60))
})

t.test('a window ends exactly: in its last millisecond the wait is one second, and then there is none', async (t) => {
  const limit = newLimit(1, 70)
  for (let n = 0; n < 20; n++) {
    await redis.set(limit.key, 1, 'PX', 5)
    let seconds: number
    do {
      seconds = await rateLimits.retryAfterSeconds([limit])
      t.ok(seconds <= 1, `${seconds} s`)
    } while (seconds > 0)
  }
})

t.test('a refund gives one unit of each limit back, and deletes a counter without units', async (t) => {
  const [three, two, one, none] = [newLimit(9, 100), newLimit(9, 100), newLimit(9, 100), newLimit(9, 100)]
  const limits = [three, two, one, none]
  for (const consumed of [[three], [three, two], [three, two, one]]) t.equal(await rateLimits.consume(consumed), 0)
  await rateLimits.refund(limits, performance.now())
  t.strictSame(await counts(limits), ['2', '1', null, null])
  await checkTtl(t, three, 100)

  await redis.set(none.key, 'sent', 'PX', 50_000)
  await rateLimits.refund([none, three], performance.now())
  t.strictSame(await counts(limits), ['1', '1', null, 'sent'], 'what is no number stays')
})

t.test('every unit can be given back at once', async (t) => {
  const limit = newLimit(9, 100)
  // Mostly in the same millisecond, so that the TTL is still that of a new window.
  for (let n = 0; n < 100; n++) {
    t.equal(await rateLimits.consume([limit]), 0)
    await rateLimits.refund([limit], performance.now())
    t.equal(await redis.exists(limit.key), 0)
  }
})

t.test('a unit of a window that has ended is not given back to the next one', async (t) => {
  const [ended, current] = [newLimit(9, 100), newLimit(9, 300)]
  t.equal(await rateLimits.consume([ended, current]), 0)
  await redis.pexpire(current.key, 200_000)
  await rateLimits.refund([ended, current], performance.now() - 90_000)
  t.strictSame(await counts([ended, current]), ['1', null])
})

t.test('a reset gives all units back', async (t) => {
  const limits = [newLimit(9, 100), newLimit(9, 100)]
  for (let n = 0; n < 3; n++) t.equal(await rateLimits.consume(limits), 0)
  await rateLimits.reset(limits)
  t.strictSame(await counts(limits), [null, null])
})

t.test('if Redis fails, nothing is consumed', async (t) => {
  const [limit, broken] = [newLimit(9, 100), newLimit(9, 100)]
  await redis.hset(broken.key, 'no', 'counter')
  await t.rejects(rateLimits.consume([limit, broken]), { message: /WRONGTYPE/ })
  t.strictSame(await counts([limit]), [null])
})

t.test(
  'in a Cluster the limits of each slot are consumed in turn, and given back if a later one is exhausted',
  async (t) => {
    // One Redis in place of a Cluster. test/redis-topologies.test.ts has a real one.
    app.isRedisCluster = true
    t.teardown(() => {
      app.isRedisCluster = false
    })
    const tag = randomUUID()
    const onSlot = (n: number) => newLimit(5, 300, 'login_mobile', `limit:{${tag}}:${n}`)
    const [before, first, after, second] = [newLimit(5, 300), onSlot(1), newLimit(5, 300), onSlot(2)]
    const limits = [before, first, after, second]
    t.equal(await rateLimits.consume(limits), 0)
    t.strictSame(await counts(limits), ['1', '1', '1', '1'])

    await redis.set(first.key, 5, 'PX', 80_000)
    await redis.set(second.key, 5, 'PX', 200_000)
    refusals.length = 0
    t.ok(isAbout(await rateLimits.consume(limits), 200), 'the limits of one slot are one group')
    t.strictSame(refusals, ['login_mobile'])
    t.strictSame(await counts(limits), ['1', '5', '1', '5'])
    t.ok(isAbout(await rateLimits.retryAfterSeconds(limits), 200))

    await redis.set(after.key, 5, 'PX', 100_000)
    await redis.del(first.key, second.key)
    t.ok(isAbout(await rateLimits.consume(limits), 100))
    t.strictSame(await counts(limits), ['1', null, '5', null])

    await redis.del(after.key)
    await redis.hset(after.key, 'no', 'counter')
    await t.rejects(rateLimits.consume(limits), { message: /WRONGTYPE/ })
    t.strictSame(await counts([before, first, second]), ['1', null, null])
    await rateLimits.refund([before, first, second], performance.now())
    t.strictSame(await counts([before, first, second]), [null, null, null])
  }
)
