import type { Result } from 'ioredis'
import type { Observer } from '../telemetry/observer.js'
import type { RedisStore } from './redis.js'

/** The limits that refuse requests. */
export const limitNames = [
  'sms_resend',
  'sms_mobile',
  'sms_network',
  'sms_prefix',
  'sms_all',
  'guesses_guesser',
  'guesses_mobile',
  'guesses_network',
  'guesses_all',
  'login_mobile_network',
  'login_mobile',
  'login_network',
  'login_device'
] as const

export type LimitName = (typeof limitNames)[number]

/** At most `max` units in the last `seconds`. */
export interface Limit {
  name: LimitName
  /** The Redis key of a sorted set: each unit, by the time at which it was consumed. */
  key: string
  max: number
  seconds: number
  /**
   * The key is a plain string that other services may write, too. Whatever it holds, one unit is consumed while it exists.
   * `max` is 1.
   */
  isPlainKey?: true
}

declare module 'ioredis' {
  interface RedisCommander<Context> {
    consumeLimits(
      numberOfKeys: number,
      ...args: (string | number)[]
    ): Result<[waitMs: number, longest: number], Context>
    refundLimits(numberOfKeys: number, ...args: string[]): Result<null, Context>
    markFailed(numberOfKeys: number, ...args: string[]): Result<null, Context>
    clearFailures(numberOfKeys: number, ...keys: string[]): Result<null, Context>
  }
}

/**
 * The score of a unit is the time in ms at which it was consumed. While its try is in flight, the score is half a ms less: so failed
 * tries can be told from tries in flight. Less and not more, so that the wait is never a ms longer than the window.
 *
 * ARGV: the unit, or '' to look only; for each key its maximum (0 for a plain key) and its window in ms. Returns 0, or the ms
 * until there is room, and the number of the key with the longest wait.
 */
const consumeLimits = `
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local unit = ARGV[1]
local longest, wait = 0, 0
for n, key in ipairs(KEYS) do
  local max, window = tonumber(ARGV[2 * n]), tonumber(ARGV[2 * n + 1])
  local remaining = 0
  if max == 0 then
    remaining = redis.call('PTTL', key)
    if remaining == -1 then
      -- Another service wrote it without a TTL.
      redis.call('PEXPIRE', key, window)
      remaining = window
    end
  else
    -- With n units over the maximum, there is room when the n + 1 oldest have expired.
    local expired = redis.call('ZCOUNT', key, '-inf', now - window)
    local excess = redis.call('ZCARD', key) - expired - max
    if excess >= 0 then
      local rank = expired + excess
      remaining = math.ceil(redis.call('ZRANGE', key, rank, rank, 'WITHSCORES')[2] + window - now)
    end
  end
  if remaining > wait then longest, wait = n, remaining end
end
if wait > 0 or unit == '' then return { wait, longest } end
for n, key in ipairs(KEYS) do
  local max, window = tonumber(ARGV[2 * n]), tonumber(ARGV[2 * n + 1])
  if max == 0 then redis.call('SET', key, unit, 'PX', window)
  else
    -- The first write is one that a full Redis refuses.
    redis.call('ZADD', key, now - 0.5, unit)
    redis.call('ZREMRANGEBYSCORE', key, '-inf', now - window)
    redis.call('PEXPIRE', key, window)
  end
end
return { 0, 0 }
`

/** ARGV: the unit, and for each key its maximum (0 for a plain key). The plain key of another unit stays. */
const refundLimits = `
for n, key in ipairs(KEYS) do
  if ARGV[n + 1] ~= '0' then redis.call('ZREM', key, ARGV[1])
  elseif redis.call('GET', key) == ARGV[1] then redis.call('DEL', key) end
end
`

/** ARGV: the unit of a try that has failed. */
const markFailed = `
for _, key in ipairs(KEYS) do
  local score = redis.call('ZSCORE', key, ARGV[1])
  if score then redis.call('ZADD', key, math.ceil(score), ARGV[1]) end
end
`

/** Removes the units of tries that have failed. Those of tries in flight stay. */
const clearFailures = `
for _, key in ipairs(KEYS) do
  local units = redis.call('ZRANGE', key, 0, -1, 'WITHSCORES')
  for n = 1, #units, 2 do
    if units[n + 1] % 1 == 0 then redis.call('ZREM', key, units[n]) end
  end
end
`

export type RateLimits = ReturnType<typeof createRateLimits>

/** Limits that all instances share, counted in Redis. */
export function createRateLimits(redis: RedisStore, observer: Observer | undefined) {
  redis.defineScripts({
    consumeLimits: { lua: consumeLimits },
    refundLimits: { lua: refundLimits },
    markFailed: { lua: markFailed },
    clearFailures: { lua: clearFailures }
  })

  // In a Cluster a script runs on one slot. There the limits of each slot are consumed in turn, and refunded if a later one
  // is exhausted. Meanwhile another request may be refused, but no unit is consumed twice.
  const slotOf = ({ key }: Limit) => (redis.isCluster ? (/\{(.+?)\}/.exec(key)?.[1] ?? key) : '')
  function groupsOf(limits: readonly Limit[]): Limit[][] {
    const slots = new Set(limits.map(slotOf))
    return [...slots].map((slot) => limits.filter((limit) => slotOf(limit) === slot))
  }
  const keysOf = (limits: readonly Limit[]) => limits.map(({ key }) => key)
  const maxOf = ({ max, isPlainKey }: Limit) => (isPlainKey ? 0 : max)

  /**
   * @param unit '' to look only
   * @returns the ms until every limit of the group has room, and the limit with the longest wait
   */
  async function consumeGroup(group: readonly Limit[], unit: string) {
    const bounds = group.flatMap((limit) => [maxOf(limit), limit.seconds * 1_000])
    const [waitMs, longest] = await redis.run((client) =>
      client.consumeLimits(group.length, ...keysOf(group), unit, ...bounds)
    )
    return { waitMs, limit: group[longest - 1] }
  }
  const refundGroup = (group: readonly Limit[], unit: string) =>
    redis.run((client) =>
      client.refundLimits(group.length, ...keysOf(group), unit, ...group.map((limit) => `${maxOf(limit)}`))
    )

  return {
    /**
     * Consumes a unit of every limit, or of none if one is exhausted. In a Cluster the limits are consumed in the given order,
     * slot by slot.
     *
     * @param unit identifies the unit for a refund; unique
     * @returns 0, or the seconds until every limit has room again
     */
    async consume(limits: readonly Limit[], unit: string): Promise<number> {
      const consumed: Limit[][] = []
      const refundConsumed = () => Promise.allSettled(consumed.map((group) => refundGroup(group, unit)))
      for (const group of groupsOf(limits)) {
        const answer = await consumeGroup(group, unit).catch(async (error) => {
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
    /** Returns what `consume` would return, and consumes nothing. */
    async retryAfterSeconds(limits: readonly Limit[]): Promise<number> {
      const answers = await Promise.all(groupsOf(limits).map((group) => consumeGroup(group, '')))
      return Math.ceil(Math.max(0, ...answers.map(({ waitMs }) => waitMs)) / 1_000)
    },
    /** Refunds a unit of every limit. A unit that has expired, or was refunded before, changes nothing. */
    async refund(limits: readonly Limit[], unit: string): Promise<void> {
      await Promise.all(groupsOf(limits).map((group) => refundGroup(group, unit)))
    },
    /** Refunds the newest unit of every limit. */
    async refundNewest(limits: readonly Limit[]): Promise<void> {
      await Promise.all(keysOf(limits).map((key) => redis.run((client) => client.zpopmax(key))))
    },
    /** Says that the try with this unit is no longer in flight, and has failed. */
    async markFailed(limits: readonly Limit[], unit: string): Promise<void> {
      const groups = groupsOf(limits).map(keysOf)
      await Promise.all(groups.map((keys) => redis.run((client) => client.markFailed(keys.length, ...keys, unit))))
    },
    /** Refunds the units of tries that have failed, and not those of tries in flight. */
    async clearFailures(limits: readonly Limit[]): Promise<void> {
      const groups = groupsOf(limits).map(keysOf)
      await Promise.all(groups.map((keys) => redis.run((client) => client.clearFailures(keys.length, ...keys))))
    }
  }
}
