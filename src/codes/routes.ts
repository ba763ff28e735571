import { type Static, Type } from '@sinclair/typebox'
import type { FastifyPluginAsync, FastifyReply, FastifyRequest } from 'fastify'
import type { Config } from '../config/config.js'
import { bodyMaxBytes, bodyOutcomes, mobileField, repliesWith } from '../http/schemas.js'
import { outcomes, Refusal } from '../outcomes.js'
import { StoreUnavailable } from '../stores/store-unavailable.js'
import type { CodePurpose } from './codes.js'
import { mobileLimits, unusedCodeLimits } from './limits.js'
import { MessageNotSent } from './senders/sender.js'

const SendCodeBody = Type.Object({
  mobile: mobileField,
  purpose: Type.Optional(
    Type.Unsafe<CodePurpose>({
      type: 'string',
      enum: ['sign_up', 'password'],
      examples: ['sign_up'],
      description: 'The code then works only for a sign-up, or only for a new password. Without it, for both.'
    })
  )
})

const CodeSentData = Type.Object({
  ticket: Type.String({
    description: 'Send it with the code: then nobody else can use up your tries.',
    examples: ['b2Zo1cNvTtQx.mf3k2p1q.Xq8mJ0Vw3eVdS1JxuC5Vb8o0cC7wU0kYy2bF1m9rPzE']
  })
})

type SendCodeRequest = FastifyRequest<{ Body: Static<typeof SendCodeBody> }>

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
      response: repliesWith(CodeSentData)
    },
    config: {
      outcomes: [...bodyOutcomes, 'code_sent', 'too_many_requests', 'sms_gateway_unavailable'],
      data: { code_sent: CodeSentData }
    },
    bodyLimit: bodyMaxBytes,
    handler: (request: SendCodeRequest, reply: FastifyReply) => fastify.inFlight.track(sendCode(request, reply))
  })

  async function sendCode(request: SendCodeRequest, reply: FastifyReply) {
    const { mobile } = request.body
    const pauseSeconds = fastify.sms.pauseSeconds()
    if (pauseSeconds > 0) return reply.outcome('sms_gateway_unavailable', { retryAfterSeconds: pauseSeconds })

    const retryAfterSeconds = await consumeLimits(mobile, request.ip)
    if (retryAfterSeconds > 0) return reply.outcome('too_many_requests', { retryAfterSeconds })

    await issueAndSend(request, performance.now())
    return reply.outcome('code_sent', { data: { ticket: fastify.codes.createTicket(mobile) } })
  }

  /** The limits of the network come first: in a Cluster, a client that has exhausted them must not consume units of the mobile. */
  const limitsOf = (mobile: string, address: string) => [
    ...unusedCodeLimits(config, mobile, address),
    ...mobileLimits(config, mobile)
  ]

  /** Returns 0, or the seconds until another code may be sent. */
  async function consumeLimits(mobile: string, address: string): Promise<number> {
    try {
      return await fastify.rateLimits.consume(limitsOf(mobile, address))
    } catch (error) {
      // The units may be consumed although the answer of Redis is lost.
      throw withRetryAfterResend(error)
    }
  }

  /**
   * Issues a code and sends it.
   *
   * @param consumedAt when the limits were consumed
   */
  async function issueAndSend(request: SendCodeRequest, consumedAt: number): Promise<void> {
    const { body, ip, log, id } = request
    const { mobile, purpose } = body
    /** Refunds the units of the mobile, because no message was sent. The other limits count the failure. */
    const refundMobile = () => fastify.rateLimits.refund(mobileLimits(config, mobile), consumedAt)

    const issued = await fastify.codes.issue(mobile, purpose, ip).catch(async (error) => {
      await refundMobile().catch(() => {
        throw withRetryAfterResend(error)
      })
      throw error
    })
    try {
      await fastify.sms.send(mobile, issued.code, issued.ttlSeconds)
    } catch (error) {
      if (!(error instanceof MessageNotSent)) {
        // The message may arrive, so its code stays valid and its units stay consumed.
        const retryAfterSeconds = await secondsUntilNext(mobile, ip)
        throw new Refusal('sms_gateway_unavailable', error, { retryAfterSeconds })
      }
      // The code first: a retry must not be sent the code that is withdrawn.
      await fastify.codes
        .withdraw(mobile, issued.code)
        .catch((err) => log.error({ reqId: id, err }, 'a code could not be withdrawn'))
      await refundMobile().catch((err) => log.error({ reqId: id, err }, 'a limit could not be refunded'))
      const retryAfterSeconds = Math.max(
        outcomes.sms_gateway_unavailable.retryAfterSeconds,
        await secondsUntilNext(mobile, ip)
      )
      throw new Refusal('sms_gateway_unavailable', error, { retryAfterSeconds })
    }
  }

  /** Sets the `Retry-After` of a failure of Redis that may have left units consumed. An earlier retry would get 429. */
  function withRetryAfterResend(error: unknown): unknown {
    if (error instanceof StoreUnavailable) error.retryAfterSeconds = Math.max(1, config.smsResendS)
    return error
  }

  /** Returns the seconds until the next code for a mobile may be sent, at least 1. */
  async function secondsUntilNext(mobile: string, address: string): Promise<number> {
    const seconds = await fastify.rateLimits.retryAfterSeconds(limitsOf(mobile, address)).catch(() => config.smsResendS)
    return Math.max(1, seconds)
  }
}
