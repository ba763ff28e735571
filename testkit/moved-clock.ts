import { Redis } from 'ioredis'
import type { Test } from 'tap'

const offsetKey = 'moved-clock:offset'

/** The scripts of the service read the clock of Redis. Here a key moves it. */
const readsOffset = (lua: string) =>
  lua.replaceAll(
    `redis.call('TIME')`,
    `(function() local t = redis.call('TIME') t[1] = t[1] + (redis.call('GET', '${offsetKey}') or 0) return t end)()`
  )

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
    for (const key of await redis.keys('*')) {
      const ms = await redis.pttl(key)
      if (ms > seconds * 1_000) await redis.pexpire(key, ms - seconds * 1_000)
      else if (ms >= 0) await redis.del(key)
    }
    await redis.set(offsetKey, offsetSeconds)
  }
  return { app, pass }
}
