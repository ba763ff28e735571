import type { Result } from 'ioredis'

declare module 'ioredis' {
  interface RedisCommander<Context> {
    indexSession(indexKey: string, epochKey: string, ...args: (string | number)[]): Result<string[] | null, Context>
    endSessions(indexKey: string, epochKey: string, epoch: number, ttlSeconds: number): Result<string[], Context>
  }
}

/**
 * ARGV: the session id, its epoch, the TTL in seconds, the most sessions, and the ids that it replaces. Returns nil if the
 * epoch has ended. Otherwise it returns the ids of the sessions above the maximum, oldest first, which leave the index after
 * they are destroyed.
 */
export const indexSession = `
if tonumber(redis.call('GET', KEYS[2]) or 0) > tonumber(ARGV[2]) then return nil end
local now = redis.call('TIME')[1]
-- The first write is one that a full Redis refuses.
redis.call('ZADD', KEYS[1], now + ARGV[3], ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
for n = 5, #ARGV do redis.call('ZREM', KEYS[1], ARGV[n]) end
redis.call('EXPIRE', KEYS[1], ARGV[3])
local excess = redis.call('ZCARD', KEYS[1]) - ARGV[4]
return excess > 0 and redis.call('ZRANGE', KEYS[1], 0, excess - 1) or {}
`

/**
 * ARGV: the new epoch, its TTL in seconds. The epoch never falls: two resets may arrive here in any order. Returns the ids
 * of the index.
 */
export const endSessions = `
if tonumber(redis.call('GET', KEYS[2]) or 0) < tonumber(ARGV[1]) then
  redis.call('SET', KEYS[2], ARGV[1], 'EX', ARGV[2])
end
return redis.call('ZRANGE', KEYS[1], 0, -1)
`
