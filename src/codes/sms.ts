import { randomUUID } from 'node:crypto'
import fp from 'fastify-plugin'
import type { Config } from '../config/config.js'
import { Refusal } from '../outcomes.js'
import { CircuitBreaker } from '../stores/circuit-breaker.js'
import { logSender } from './senders/log.js'
import { MessageRefused } from './senders/sender.js'
import { webhookSender } from './senders/webhook.js'

interface Sms {
  /**
   * Sends a code to a mobile.
   *
   * @throws {Refusal} `sms_gateway_unavailable`, at once while the gateway keeps failing
   */
  send(mobile: string, code: string): Promise<void>
}

declare module 'fastify' {
  interface FastifyInstance {
    sms: Sms
  }
}

/** Failures in a row after which the gateway gets no messages for a while. */
const failuresToOpen = 5

/** How long it gets none, until one message is the trial. */
const pauseMs = 5_000

export const sms = fp<{ config: Config }>(
  async (fastify, { config: { smsWebhookUrl, smsWebhookSecret, smsCodeTtlS, embedded } }) => {
    const send =
      smsWebhookUrl === undefined ? logSender(fastify.log, embedded) : webhookSender(smsWebhookUrl, smsWebhookSecret)
    // A number that the gateway refuses says nothing about the gateway. Otherwise one such number could stop all messages.
    const isFailure = (error: unknown) => !(error instanceof MessageRefused)
    const breaker = new CircuitBreaker({ failuresToOpen, pauseMs, isFailure })

    fastify.decorate('sms', {
      async send(mobile, code) {
        try {
          await breaker.execute(() => send({ mobile, code, ttlSeconds: smsCodeTtlS, id: randomUUID() }))
        } catch (cause) {
          throw new Refusal('sms_gateway_unavailable', cause)
        }
      }
    } satisfies Sms)
  },
  { fastify: '5.x', name: 'sms' }
)
