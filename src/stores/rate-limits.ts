import fp from 'fastify-plugin'
import type { Result } from 'ioredis'
import type { Observer } from '../telemetry/observer.js'

/** The limits that refuse requests. */
export const limitNames = [
  'sms_resend',
  'sms_mobile',
  'sms_network',
  'sms_prefix',
  'sms_all',
  'guesses_guesser',
  'guesses_mobile',
  'login_mobile_network',
  'login_mobile',
  'login_network'
] as const

export type LimitName = (typeof limitNames)[number]

/** A number of units in a window that begins with the first unit. */
export interface Limit {
  name: LimitName
  /** The Redis key of the counter. */
  key: string
  max: number
  seconds: number
}

interface RateLimits {
  /**
   * Consumes one unit of every limit, or none of any if one is exhausted. In a Cluster the limits are consumed in the given
   * order, slot by slot.
   *
   * @returns 0, or the seconds until every limit has a unit again
   */
  consume(limits: readonly Limit[]): Promise<number>
  /** Returns what {@link consume} would return, and consumes nothing. */
  retryAfterSeconds(limits: readonly Limit[]): Promise<number>
  /**
   * Refunds one unit of every limit, unless its window has ended since.
   *
   * @param consumedAt by `performance.now()`
   */
  refund(limits: readonly Limit[], consumedAt: number): Promise<void>
  /** Sets the counters back to zero. */
  reset(limits: readonly Limit[]): Promise<void>
}

declare module 'fastify' {
  interface FastifyInstance {
    rateLimits: RateLimits
  }
}

declare module 'ioredis' {
  interface RedisCommander<Context> {
    consumeLimits(
      numberOfKeys: number,
      ...args: (string | number)[]
    ): Result<[waitMs: number, longest: number], Context>
    refundLimits(numberOfKeys: number, ...args: (string | number)[]): Result<null, Context>
  }
}

/**
 * ARGV: 1 to consume or 0 to look, and for each key its maximum and its window in ms. Returns 0, or the ms until there is
 * room, and the number of the key with the longest wait. If another service wrote something that is not a number, the limit
 * counts as exhausted.
 */
const consumeLimits = `
local wait, longest = 0, 0
for n = 1, #KEYS do
  local count = redis.call('GET', KEYS[n])
  if count and (tonumber(count) or math.huge) >= tonumber(ARGV[2 * n]) then
    local ttl = redis.call('PTTL', KEYS[n])
    if ttl < 0 then ttl = tonumber(ARGV[2 * n + 1]) end
    if math.max(ttl, 1) > wait then wait, longest = math.max(ttl, 1), n end
  end
end
if wait > 0 or ARGV[1] == '0' then return { wait, longest } end
for n = 1, #KEYS do
  if redis.call('INCR', KEYS[n]) == 1 then redis.call('PEXPIRE', KEYS[n], ARGV[2 * n + 1]) end
end
return { 0, 0 }
`

/**
 * ARGV: for each key the longest TTL in ms of a window that had begun when its unit was consumed. A longer one belongs to a
 * later window.
 */
const refundLimits = `
for n = 1, #KEYS do
  local count = tonumber(redis.call('GET', KEYS[n]))
  if count and redis.call('PTTL', KEYS[n]) <= tonumber(ARGV[n]) then
    if count > 1 then redis.call('DECR', KEYS[n]) else redis.call('DEL', KEYS[n]) end
  end
end
`

/** Limits that all instances share, counted in Redis. */
export const rateLimits = fp<{ observer?: Observer | undefined }>(
  async (fastify, { observer }) => {
    fastify.defineRedisScripts({ consumeLimits: { lua: consumeLimits }, refundLimits: { lua: refundLimits } })

    // In a Cluster a script runs on one slot. There the limits of each slot are consumed in turn, and refunded if a later one
    // is exhausted. Meanwhile another request may be refused, but no unit is consumed twice.
    const slotOf = ({ key }: Limit) => (fastify.isRedisCluster ? (/\{(.+?)\}/.exec(key)?.[1] ?? key) : '')
    function groupsOf(limits: readonly Limit[]): Limit[][] {
      const slots = new Set(limits.map(slotOf))
      return [...slots].map((slot) => limits.filter((limit) => slotOf(limit) === slot))
    }
    const keysOf = (limits: readonly Limit[]) => limits.map(({ key }) => key)

    /** Returns the ms until every limit of the group has a unit, and the limit with the longest wait. */
    async function consumeGroup(group: readonly Limit[], mode: 'consume' | 'look') {
      const bounds = group.flatMap(({ max, seconds }) => [max, seconds * 1_000])
      const [waitMs, longest] = await fastify.withRedis((redis) =>
        redis.consumeLimits(group.length, ...keysOf(group), mode === 'consume' ? 1 : 0, ...bounds)
      )
      return { waitMs, limit: group[longest - 1] }
    }
    const refundGroup = (group: readonly Limit[], consumedAt: number) => {
      const ageMs = Math.floor(performance.now() - consumedAt)
      const longestTtls = group.map(({ seconds }) => seconds * 1_000 - ageMs)
      return fastify.withRedis((redis) => redis.refundLimits(group.length, ...keysOf(group), ...longestTtls))
    }

    fastify.decorate('rateLimits', {
      async consume(limits) {
        const consumed: Limit[][] = []
        const refundConsumed = () => Promise.all(consumed.map((group) => refundGroup(group, performance.now())))
        for (const group of groupsOf(limits)) {
          const answer = await consumeGroup(group, 'consume').catch(async (error) => {
            await refundConsumed()
            throw error
          })
          if (answer.waitMs > 0) {
            await refundConsumed()
            if (answer.limit) observer?.onLimitReached(answer.limit.name)
            return Math.ceil(answer.waitMs / 1_000)
          }
          consumed.push(group)
        }
        return 0
      },
      async retryAfterSeconds(limits) {
        const answers = await Promise.all(groupsOf(limits).map((group) => consumeGroup(group, 'look')))
        return Math.ceil(Math.max(0, ...answers.map(({ waitMs }) => waitMs)) / 1_000)
      },
      async refund(limits, consumedAt) {
        await Promise.all(groupsOf(limits).map((group) => refundGroup(group, consumedAt)))
      },
      async reset(limits) {
        await Promise.all(keysOf(limits).map((key) => fastify.withRedis((redis) => redis.del(key))))
      }
    } satisfies RateLimits)
  },
  { fastify: '5.x', name: 'rate-limits', dependencies: ['redis'] }
)
