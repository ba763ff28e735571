import { timingSafeEqual } from 'node:crypto'
import fp from 'fastify-plugin'

interface Codes {
  /**
   * Takes the SMS code of a mobile: right or wrong, the code is gone afterwards, so that each is used once and cannot
   * be guessed at.
   *
   * @returns whether the presented code was the right one
   */
  take(mobile: string, presented: string): Promise<boolean>
}

declare module 'fastify' {
  interface FastifyInstance {
    codes: Codes
  }
}

/** The key is a contract with the services that write codes. */
const keyOf = (mobile: string) => `sms_code_${mobile}`

export const codes = fp(
  async (fastify) => {
    fastify.decorate('codes', {
      async take(mobile, presented) {
        const code = await fastify.onRedis((redis) => redis.getdel(keyOf(mobile)))
        return code !== null && equal(code, presented)
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
