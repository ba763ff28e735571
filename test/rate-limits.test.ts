import { randomUUID } from 'node:crypto'
import Fastify from 'fastify'
import t from 'tap'
import { createRateLimits, type Limit, type LimitName } from '#src/stores/rate-limits.js'
import { openRedis } from '#src/stores/redis.js'
import { startTestbed } from '../testkit/testbed.js'

/*
 * How limits count, and how long a refused request must wait. test/sms-codes.test.ts and test/logins.test.ts have the limits on
 * messages and logins.
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
const store = await openRedis(app, config(), observer)
const rateLimits = createRateLimits(store, observer)

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

/** Makes all units of a limit older. */
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

  const lowered = { ...limit, max: 1 }
  t.ok(isAbout(await consume([lowered]), 100), 'after the maximum was lowered, all units but none must leave')
})

t.test('if any limit is exhausted, none is consumed; the wait is the longest, and its limit is reported', async (t) => {
  const names: LimitName[] = ['sms_mobile', 'sms_network', 'sms_all']
  for (const exhausted of names) {
    const limits = names.map((name) => newLimit(2, 100, name))
    const [limit] = limits.filter(({ name }) => name === exhausted)
    if (limit === undefined) throw new Error('no such limit')
    await consume([limit], 2)
    refusals.length = 0
    t.ok(isAbout(await consume(limits), 100))
    t.strictSame(refusals, [exhausted])
    t.strictSame(
      await counts(limits),
      names.map((name) => (name === exhausted ? 2 : 0))
    )
  }

  const [short, long, plain] = [newLimit(1, 80, 'sms_prefix'), newLimit(1, 200), newPlainLimit(140)]
  const limits = [short, plain, long]
  await consume(limits)
  for (const order of [limits, limits.toReversed()]) {
    refusals.length = 0
    t.ok(isAbout(await consume(order), 200))
    t.strictSame(refusals, ['sms_all'])
    t.ok(isAbout(await rateLimits.retryAfterSeconds(order), 200))
  }
})

t.test('a look consumes nothing and reports nothing', async (t) => {
  const [used, unused, plain] = [newLimit(2, 100), newLimit(2, 100), newPlainLimit(100)]
  await consume([used])
  refusals.length = 0
  t.equal(await rateLimits.retryAfterSeconds([used, unused, plain]), 0)
  await consume([used])
  t.ok(isAbout(await rateLimits.retryAfterSeconds([unused, used, plain]), 100))
  t.strictSame(await counts([used, unused]), [2, 0])
  t.equal(await redis.exists(plain.key), 0)
  t.strictSame(refusals, [])
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

t.test('failures are cleared, and units of tries in flight are not', async (t) => {
  const limits = [newLimit(3, 100), newLimit(9, 100)]
  const [failed, inFlight, expired] = ['failed', 'in flight', 'expired']
  for (const unit of [failed, inFlight]) t.equal(await rateLimits.consume(limits, unit), 0)
  await rateLimits.markFailed(limits, failed)
  await rateLimits.markFailed(limits, expired)
  t.strictSame(await counts(limits), [2, 2], 'a unit that has expired does not come back')
  t.equal(await consume(limits), 0)
  t.ok(isAbout(await consume(limits), 100), 'a failure counts')
  await rateLimits.clearFailures(limits)
  t.strictSame(await counts(limits), [2, 2])
  await rateLimits.markFailed(limits, inFlight)
  await rateLimits.clearFailures(limits)
  t.strictSame(await counts(limits), [1, 1])
  const unused = [newLimit(3, 100)]
  await rateLimits.markFailed(unused, failed)
  t.equal(await redis.exists(unused[0]?.key ?? ''), 0, 'no key without a TTL')
})

t.test('if Redis fails, nothing is consumed', async (t) => {
  const [limit, broken] = [newLimit(9, 100), newLimit(9, 100)]
  await redis.hset(broken.key, 'no', 'limit')
  await t.rejects(consume([limit, broken]), { message: /WRONGTYPE/ })
  t.strictSame(await counts([limit]), [0])
})

t.test(
  'in a Cluster the limits of each slot are consumed in turn, and given back if a later one is exhausted',
  async (t) => {
    // One Redis in place of a Cluster. test/redis-topologies.test.ts has a real one.
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
  }
)
