import { Redis } from 'ioredis'
import type { Test } from 'tap'

const offsetKey = 'moved-clock:offset'

/** The scripts of the service read the clock of Redis. Here a key moves it. */
const readsOffset = (lua: string) =>
  lua.replaceAll(
    `redis.call('TIME')`,
    `(function() local t = redis.call('TIME') t[1] = t[1] + (redis.call('GET', '${offsetKey}') or 0) return t end)()`
  )

const passTime = `
for _, key in ipairs(redis.call('KEYS', '*')) do
  local ttl, passed = redis.call('PTTL', key), ARGV[1] * 1000
  if ttl > passed then redis.call('PEXPIRE', key, ttl - passed)
  elseif ttl >= 0 then redis.call('DEL', key) end
end
redis.call('INCRBY', KEYS[1], ARGV[1])
`

/**
 * Gives applications a clock that a test moves, instead of waiting for hours. It is that of everything that a limit, a code or a ticket
 * compares: `TIME` in the scripts of the service, `Date.now()`, and the TTLs in Redis.
 *
 * @param build builds the applications
 */
export async function withMovedClock<App>(t: Test, redis: Redis, build: () => Promise<App>) {
  const { defineCommand } = Redis.prototype
  Redis.prototype.defineCommand = function (name, definition) {
    return defineCommand.call(this, name, { ...definition, lua: readsOffset(definition.lua) })
  }
  const app = await build().finally(() => {
    Redis.prototype.defineCommand = defineCommand
  })
  const { now } = Date
  let offsetSeconds = 0
  t.intercept(Date, 'now', { value: () => now() + offsetSeconds * 1_000 })

  async function pass(seconds: number): Promise<void> {
    offsetSeconds += seconds
    await redis.eval(passTime, 1, offsetKey, seconds)
  }
  return { app, pass }
}

/** Lets a test move `performance.now()`, by which the service measures time spans. */
export function movePerformanceClock(t: Test) {
  const { now } = performance
  let offsetMs = 0
  t.intercept(performance, 'now', { value: () => now.call(performance) + offsetMs })
  return { pass: (ms: number) => (offsetMs += ms) }
}
