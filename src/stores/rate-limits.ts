import fp from 'fastify-plugin'
import { Cluster, type Result } from 'ioredis'

/** So many in a time that begins with the first. */
export interface Limit {
  /** A key of Redis, which counts. */
  key: string
  max: number
  seconds: number
}

interface Throttles {
  /**
   * Takes one of each limit, or, where one is reached, none of any.
   *
   * @returns undefined, or the seconds until all have room again
   */
  take(limits: readonly Limit[]): Promise<number | undefined>
  /** Gives back what was taken for nothing. */
  giveBack(limits: readonly Limit[]): Promise<void>
  /** Forgets what was counted. */
  clear(limit: Limit): Promise<void>
}

declare module 'fastify' {
  interface FastifyInstance {
    throttles: Throttles
  }
}

declare module 'ioredis' {
  interface RedisCommander<Context> {
    takeOfLimits(numberOfKeys: number, ...args: (string | number)[]): Result<number, Context>
    giveBackToLimits(numberOfKeys: number, ...args: string[]): Result<null, Context>
  }
}

/**
 * ARGV: of each key the most that it may count, and for how many ms. Returns 0, or the ms until there is room.
 * What another service has put under a key, and is no number, counts as a limit that is reached.
 */
const takeOfLimits = `
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

const giveBackToLimits = `
for n = 1, #KEYS do
  local count = tonumber(redis.call('GET', KEYS[n]))
  if count and count > 1 then redis.call('DECR', KEYS[n]) else redis.call('DEL', KEYS[n]) end
end
`

/** Counters in Redis that all instances share. */
export const throttles = fp(
  async (fastify) => {
    let isCluster = false
    await fastify.onRedis(async (redis) => {
      isCluster = redis instanceof Cluster
      redis.defineCommand('takeOfLimits', { lua: takeOfLimits })
      redis.defineCommand('giveBackToLimits', { lua: giveBackToLimits })
    })

    // A Cluster has the limits on several nodes, and no script for more than one of them. What one limit gives there
    // goes back when another is reached; meanwhile it may be refused to somebody else, but never given twice.
    const groupsOf = (limits: readonly Limit[]) => (isCluster ? limits.map((limit) => [limit]) : [limits])
    const keysOf = (limits: readonly Limit[]) => limits.map(({ key }) => key)

    /** Returns 0, or, with none taken, the ms until all have room. */
    const takeTogether = (limits: readonly Limit[]) => {
      const bounds = limits.flatMap(({ max, seconds }) => [max, seconds * 1_000])
      return fastify.onRedis((redis) => redis.takeOfLimits(limits.length, ...keysOf(limits), ...bounds))
    }
    const giveBackTogether = (limits: readonly Limit[]) =>
      fastify.onRedis((redis) => redis.giveBackToLimits(limits.length, ...keysOf(limits)))

    fastify.decorate('throttles', {
      async take(limits) {
        const groups = groupsOf(limits)
        const waits = await Promise.allSettled(groups.map(takeTogether))
        const failure = waits.find((wait) => wait.status === 'rejected')
        const waitMs = Math.max(0, ...waits.map((wait) => (wait.status === 'fulfilled' ? wait.value : 0)))
        if (failure === undefined && waitMs === 0) return undefined
        const taken = groups.filter((_, n) => waits[n]?.status === 'fulfilled' && waits[n].value === 0)
        await Promise.all(taken.map(giveBackTogether))
        if (failure !== undefined) throw failure.reason
        return Math.ceil(waitMs / 1_000)
      },
      async giveBack(limits) {
        await Promise.all(groupsOf(limits).map(giveBackTogether))
      },
      async clear({ key }) {
        await fastify.onRedis((redis) => redis.del(key))
      }
    } satisfies Throttles)
  },
  { fastify: '5.x', name: 'throttles', dependencies: ['redis'] }
)
