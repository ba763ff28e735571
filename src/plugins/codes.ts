import { timingSafeEqual } from 'node:crypto'
import fp from 'fastify-plugin'
import type { Result } from 'ioredis'

/** A code that was taken, and what it needs to go back. */
export interface TakenCode {
  readonly mobile: string
  readonly code: string
  /** The life that it had left when it was taken; negative if it had no end. */
  readonly ttlMs: number
}

interface Codes {
  /**
   * Takes the SMS code of a mobile: right or wrong, the code is gone afterwards, so that each is used once and cannot
   * be guessed at.
   *
   * @returns the code if the presented one was right
   */
  take(mobile: string, presented: string): Promise<TakenCode | undefined>
  /** Puts a taken code back with the life that it had left, unless a newer one has come. */
  putBack(taken: TakenCode): Promise<void>
}

declare module 'fastify' {
  interface FastifyInstance {
    codes: Codes
  }
}

declare module 'ioredis' {
  interface RedisCommander<Context> {
    takeCode(key: string): Result<[code: string | null, ttlMs: number], Context>
  }
}

/** The key is a contract with the services that write codes. */
const keyOf = (mobile: string) => `sms_code_${mobile}`

/** The code and its remaining life, in one round trip. */
const takeCode = `
local ttl = redis.call('PTTL', KEYS[1])
return { redis.call('GETDEL', KEYS[1]), ttl }
`

export const codes = fp(
  async (fastify) => {
    await fastify.onRedis(async (redis) => redis.defineCommand('takeCode', { numberOfKeys: 1, lua: takeCode }))

    fastify.decorate('codes', {
      async take(mobile, presented) {
        const [code, ttlMs] = await fastify.onRedis((redis) => redis.takeCode(keyOf(mobile)))
        return code !== null && equal(code, presented) ? { mobile, code, ttlMs } : undefined
      },
      async putBack({ mobile, code, ttlMs }) {
        await fastify.onRedis((redis) =>
          ttlMs > 0 ? redis.set(keyOf(mobile), code, 'PX', ttlMs, 'NX') : redis.set(keyOf(mobile), code, 'NX')
        )
      }
    } satisfies Codes)
  },
  { fastify: '5.x', name: 'codes', dependencies: ['redis'] }
)

/** Compares in a time that depends only on the lengths. */
function equal(a: string, b: string): boolean {
  const [left, right] = [Buffer.from(a), Buffer.from(b)]
  return left.length === right.length && timingSafeEqual(left, right)
}
