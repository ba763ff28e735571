import { randomUUID } from 'node:crypto'
import { type Static, Type } from '@sinclair/typebox'
import type { FastifyPluginAsync, FastifyReply, FastifyRequest } from 'fastify'
import type { Config } from '../config/config.js'
import { networksOf } from '../http/network.js'
import { languageOf } from '../http/replies.js'
import { bodyOutcomes, mobileField, repliesWith } from '../http/schemas.js'
import { outcomes, Refusal } from '../outcomes.js'
import { bugLogger, StoreUnavailable } from '../stores/store-unavailable.js'
import { type CodePurpose, codePurposes, type Send } from './codes.js'
import { mobileLimits, unusedCodeLimits } from './limits.js'
import { MessageNotSent } from './senders/sender.js'
import type { Sms } from './sms.js'

const SendCodeBody = Type.Object({
  mobile: mobileField,
  purpose: Type.Optional(
    Type.Unsafe<CodePurpose>({
      type: 'string',
      enum: [...codePurposes],
      examples: ['sign_up'],
      description: 'For what the code works. Without it, for everything. A code serves all that was asked for.'
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
export const sendCodeRoute: FastifyPluginAsync<{ config: Config; sms: Sms }> = async (fastify, { config, sms }) => {
  const { codes, inFlight, rateLimits } = fastify.mobileSignup

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
    handler: (request: SendCodeRequest, reply: FastifyReply) => inFlight.track(sendCode(request, reply))
  })

  async function sendCode(request: SendCodeRequest, reply: FastifyReply) {
    const { body, ip, log } = request
    const { mobile, purpose } = body
    const pauseSeconds = sms.pauseSeconds()
    if (pauseSeconds > 0) return reply.outcome('sms_gateway_unavailable', { retryAfterSeconds: pauseSeconds })

    // The limits of the network come first: in a Cluster, a client that has exhausted them must not consume units of the mobile.
    const ofMobile = mobileLimits(config, mobile)
    const limits = [...unusedCodeLimits(config, mobile, ip), ...ofMobile]
    const [{ network }] = networksOf(ip)
    const send: Send = { id: randomUUID(), network }
    // If Redis does not answer, the units may be consumed. An earlier retry would get 429.
    const retryAfterSeconds = await rateLimits.consume(limits, send.id).catch(refuseUntilResend)
    if (retryAfterSeconds > 0) {
      await codes.addPurpose(mobile, purpose).catch(refuseUntilResend)
      return reply.outcome('too_many_requests', { retryAfterSeconds })
    }

    const refundMobile = () => rateLimits.refund(ofMobile, send.id)
    const { code, ttlSeconds } = await codes.issue(mobile, purpose, send).catch(async (error) => {
      await refundMobile().catch(() => refuseUntilResend(error))
      throw error
    })
    try {
      await sms.send({ mobile, code, ttlSeconds, purpose, language: languageOf(request, config) })
    } catch (error) {
      const isUnsent = error instanceof MessageNotSent
      // A message that may arrive keeps its code and its units. The other limits count the failure in any case.
      if (isUnsent) {
        // The code first: a retry must not be sent the code that is withdrawn.
        await codes.withdraw(mobile, code).catch(bugLogger(log, 'a code could not be withdrawn'))
        await refundMobile().catch(bugLogger(log, 'a limit could not be refunded'))
      }
      const waitSeconds = await rateLimits.retryAfterSeconds(limits).catch(() => config.smsResendS)
      const shortestSeconds = isUnsent ? outcomes.sms_gateway_unavailable.retryAfterSeconds : 1
      throw new Refusal('sms_gateway_unavailable', error, {
        retryAfterSeconds: Math.max(shortestSeconds, waitSeconds)
      })
    }
    return reply.outcome('code_sent', { data: { ticket: codes.createTicket(mobile) } })
  }

  function refuseUntilResend(error: unknown): never {
    if (error instanceof StoreUnavailable) error.retryAfterSeconds = Math.max(1, config.smsResendS)
    throw error
  }
}
