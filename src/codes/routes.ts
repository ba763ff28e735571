import { type Static, Type } from '@sinclair/typebox'
import type { FastifyPluginAsync, FastifyReply, FastifyRequest } from 'fastify'
import type { Config } from '../config/config.js'
import { networkOf } from '../http/network.js'
import { bodyMaxBytes, bodyOutcomes, mobileField, repliesWith } from '../http/schemas.js'
import type { Limit } from '../stores/rate-limits.js'

const SendCodeBody = Type.Object({ mobile: mobileField })

type SendCodeRequest = FastifyRequest<{ Body: Static<typeof SendCodeBody> }>

const [hour, day] = [3_600, 86_400]

/** POST /sms_codes. It never looks at the users, so it cannot tell who is registered. */
export const codeRoutes: FastifyPluginAsync<{ config: Config }> = async (fastify, { config }) => {
  fastify.route({
    method: 'POST',
    url: '/sms_codes',
    schema: {
      tags: ['sign-up'],
      operationId: 'sendCode',
      summary: 'Send a code; the answer is the same for registered and unregistered mobiles',
      body: SendCodeBody,
      response: repliesWith(Type.Object({}))
    },
    config: { outcomes: [...bodyOutcomes, 'code_sent', 'too_many_requests', 'sms_gateway_unavailable'] },
    bodyLimit: bodyMaxBytes,
    handler: (request: SendCodeRequest, reply) => fastify.inFlight.track(sendCode(request, reply))
  })

  async function sendCode(request: SendCodeRequest, reply: FastifyReply) {
    const { mobile } = request.body
    const limits = limitsOf(mobile, request.ip)
    const retryAfterSeconds = await fastify.rateLimits.consume(limits)
    if (retryAfterSeconds > 0) return reply.outcome('too_many_requests', { retryAfterSeconds })

    try {
      await issueAndSend(mobile, request)
    } catch (error) {
      await fastify.rateLimits
        .refund(limits)
        .catch((err) => request.log.error({ reqId: request.id, err }, 'a limit could not be refunded'))
      throw error
    }
    return reply.outcome('code_sent')
  }

  async function issueAndSend(mobile: string, { log, id }: FastifyRequest): Promise<void> {
    const issued = await fastify.codes.issue(mobile)
    try {
      await fastify.sms.send(mobile, issued.code)
    } catch (error) {
      await fastify.codes
        .withdraw(issued)
        .catch((err) => log.error({ reqId: id, err }, 'a code could not be withdrawn'))
      throw error
    }
  }

  /** The first key is a contract with other services. The other limits are against people who farm messages. */
  function limitsOf(mobile: string, address: string): Limit[] {
    const limits = [
      { key: `send_sms_code_${mobile}`, max: 1, seconds: config.smsResendS },
      { key: `sms_codes:mobile:${mobile}`, max: config.smsDailyMax, seconds: day },
      { key: `sms_codes:address:${networkOf(address)}`, max: config.smsIpHourlyMax, seconds: hour },
      { key: `sms_codes:prefix:${mobile.slice(0, 7)}`, max: config.smsPrefixHourlyMax, seconds: hour },
      { key: 'sms_codes:all', max: config.smsHourlyMax, seconds: hour }
    ]
    return limits.filter(({ max, seconds }) => max > 0 && seconds > 0)
  }
}
