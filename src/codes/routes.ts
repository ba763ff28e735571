import { type Static, Type } from '@sinclair/typebox'
import type { FastifyPluginAsync, FastifyReply, FastifyRequest } from 'fastify'
import { bodyMaxBytes, type Config } from '../config/config.js'
import { networkOf } from '../http/network.js'
import { bodyOutcomes, mobileField } from '../http/schemas.js'
import { repliesWith } from '../outcomes.js'
import type { Limit } from '../stores/rate-limits.js'

const SmsCodeRequest = Type.Object({ mobile: mobileField })

type SendRequest = FastifyRequest<{ Body: Static<typeof SmsCodeRequest> }>

const [hour, day] = [3_600, 86_400]

/** Whoever may be registered: nothing here looks at the users. */
export const smsCodeRoutes: FastifyPluginAsync<
  Pick<Config, 'smsResendS' | 'smsDailyMax' | 'smsIpHourlyMax' | 'smsPrefixHourlyMax' | 'smsHourlyMax'>
> = async (fastify, { smsResendS, smsDailyMax, smsIpHourlyMax, smsPrefixHourlyMax, smsHourlyMax }) => {
  fastify.route({
    method: 'POST',
    url: '/sms_codes',
    schema: {
      tags: ['sign-up'],
      operationId: 'sendCode',
      summary: 'Send a code, whoever may be registered',
      body: SmsCodeRequest,
      response: repliesWith(Type.Object({}))
    },
    config: {
      outcomes: {
        ...bodyOutcomes,
        code_sent: undefined,
        too_many_requests: undefined,
        sms_gateway_unavailable: undefined
      }
    },
    bodyLimit: bodyMaxBytes,
    handler: (request: SendRequest, reply) => fastify.finish(sendCode(request, reply))
  })

  async function sendCode(request: SendRequest, reply: FastifyReply) {
    const { mobile } = request.body
    const limits = limitsOf(mobile, request.ip)
    const retryAfter = await fastify.throttles.take(limits)
    if (retryAfter !== undefined) return reply.header('retry-after', retryAfter).outcome('too_many_requests')

    try {
      const issued = await fastify.codes.issue(mobile)
      try {
        await fastify.sms.send(mobile, issued.code)
      } catch (error) {
        await fastify.codes
          .withdraw(issued)
          .catch((err) => request.log.error({ reqId: request.id, err }, 'a code could not be withdrawn'))
        throw error
      }
    } catch (error) {
      await fastify.throttles
        .giveBack(limits)
        .catch((err) => request.log.error({ reqId: request.id, err }, 'a throttle could not be given back'))
      throw error
    }
    return reply.outcome('code_sent')
  }

  /** The key of the first is a contract with other services. The others are against whoever sends for the sending's sake. */
  function limitsOf(mobile: string, address: string): Limit[] {
    return [
      { key: `send_sms_code_${mobile}`, max: 1, seconds: smsResendS },
      { key: `sms_codes:mobile:${mobile}`, max: smsDailyMax, seconds: day },
      { key: `sms_codes:address:${networkOf(address)}`, max: smsIpHourlyMax, seconds: hour },
      { key: `sms_codes:prefix:${mobile.slice(0, 7)}`, max: smsPrefixHourlyMax, seconds: hour },
      { key: 'sms_codes:all', max: smsHourlyMax, seconds: hour }
    ].filter(({ max, seconds }) => max > 0 && seconds > 0)
  }
}
