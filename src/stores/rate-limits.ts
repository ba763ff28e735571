import fp from 'fastify-plugin'
import type { Result } from 'ioredis'

/** A number of units in a window that begins with the first unit. */
export interface Limit {
  /** The Redis key of the counter. */
  key: string
  max: number
  seconds: number
}

interface RateLimits {
  /**
   * Consumes one unit of every limit, or none of any if one is exhausted.
   *
   * @returns 0, or the seconds until every limit has a unit again
   */
  consume(limits: readonly Limit[]): Promise<number>
  /** Gives one unit of every limit back. */
  refund(limits: readonly Limit[]): Promise<void>
  /** Sets the counter back to zero. */
  reset(limit: Limit): Promise<void>
}

declare module 'fastify' {
  interface FastifyInstance {
    rateLimits: RateLimits
  }
}

declare module 'ioredis' {
  interface RedisCommander<Context> {
    consumeLimits(numberOfKeys: number, ...args: (string | number)[]): Result<number, Context>
    refundLimits(numberOfKeys: number, ...args: string[]): Result<null, Context>
  }
}

/**
 * ARGV: for each key its maximum and its window in ms. Returns 0, or the ms until there is room.
 * If another service wrote something that is not a number, the limit counts as exhausted.
 */
const consumeLimits = `
local wait = 0
for n = 1, #KEYS do
  local count = redis.call('GET', KEYS[n])
  if count and (tonumber(count) or math.huge) >= tonumber(ARGV[2 * n - 1]) then
    local ttl = redis.call('PTTL', KEYS[n])
    wait = math.max(wait, ttl < 0 and tonumber(ARGV[2 * n]) or ttl, 1)
  end
end
if wait > 0 then return wait end
for n = 1, #KEYS do
  if redis.call('INCR', KEYS[n]) == 1 then redis.call('PEXPIRE', KEYS[n], ARGV[2 * n]) end
end
return 0
`

const refundLimits = `
for n = 1, #KEYS do
  local count = tonumber(redis.call('GET', KEYS[n]))
  if count and count > 1 then redis.call('DECR', KEYS[n]) else redis.call('DEL', KEYS[n]) end
end
`

/** Limits that all instances share, counted in Redis. */
export const rateLimits = fp(
  async (fastify) => {
    fastify.defineRedisScripts({ consumeLimits: { lua: consumeLimits }, refundLimits: { lua: refundLimits } })

    // In a Cluster the counters are on several nodes, and a script runs on one. There each limit is consumed by itself and
    // refunded if another is exhausted. Meanwhile another request may be refused, but no unit is consumed twice.
    const groupsOf = (limits: readonly Limit[]) => (fastify.isRedisCluster ? limits.map((limit) => [limit]) : [limits])
    const keysOf = (limits: readonly Limit[]) => limits.map(({ key }) => key)

    /** Returns 0, or, with nothing consumed, the ms until every limit of the group has a unit. */
    const consumeGroup = (group: readonly Limit[]) => {
      const bounds = group.flatMap(({ max, seconds }) => [max, seconds * 1_000])
      return fastify.withRedis((redis) => redis.consumeLimits(group.length, ...keysOf(group), ...bounds))
    }
    const refundGroup = (group: readonly Limit[]) =>
      fastify.withRedis((redis) => redis.refundLimits(group.length, ...keysOf(group)))

    fastify.decorate('rateLimits', {
      async consume(limits) {
        const groups = groupsOf(limits)
        const results = await Promise.allSettled(groups.map(consumeGroup))
        const failure = results.find((result) => result.status === 'rejected')
        const waitMs = Math.max(0, ...results.map((result) => (result.status === 'fulfilled' ? result.value : 0)))
        if (failure === undefined && waitMs === 0) return 0
        const consumed = groups.filter((_, index) => {
          const result = results[index]
          return result?.status === 'fulfilled' && result.value === 0
        })
        await Promise.all(consumed.map(refundGroup))
        if (failure !== undefined) throw failure.reason
        return Math.ceil(waitMs / 1_000)
      },
      async refund(limits) {
        await Promise.all(groupsOf(limits).map(refundGroup))
      },
      async reset({ key }) {
        await fastify.withRedis((redis) => redis.del(key))
      }
    } satisfies RateLimits)
  },
  { fastify: '5.x', name: 'rate-limits', dependencies: ['redis'] }
)
