import Fastify, { type FastifyBaseLogger } from 'fastify'
import { maskMobiles } from '../src/telemetry/log.js'

/**
 * Starts a stand-in for the SMS gateway, which writes each code to a log.
 *
 * @returns its URL, for SMS_WEBHOOK_URL
 */
export async function receiveCodes(log: () => FastifyBaseLogger): Promise<string> {
  const gateway = Fastify()
  gateway.post<{ Body: { mobile: string; code: string } }>('/', async ({ body: { mobile, code } }, reply) => {
    log().info({ mobile: maskMobiles(mobile), code }, 'SMS code')
    return reply.code(204).send()
  })
  return gateway.listen({ port: 0, host: '127.0.0.1' })
}
