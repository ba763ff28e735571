import { randomUUID } from 'node:crypto'
import { CircuitState, ConsecutiveBreaker, circuitBreaker, handleWhen } from 'cockatiel'
import fp from 'fastify-plugin'
import type { Config } from '../config/config.js'
import { Refusal } from '../outcomes.js'
import { logSender } from './senders/log.js'
import { MessageRefused } from './senders/sender.js'
import { webhookSender } from './senders/webhook.js'

interface Sms {
  /**
   * Sends a code to a mobile.
   *
   * @throws {Refusal} `sms_gateway_unavailable`; at once while the gateway keeps failing
   */
  send(mobile: string, code: string): Promise<void>
}

declare module 'fastify' {
  interface FastifyInstance {
    sms: Sms
  }
}

/** So many failures in a row, and the gateway is left alone. */
const failuresMax = 5

/** How long it is left alone before one message tries it again. */
const pauseMs = 5_000

export const sms = fp<Pick<Config, 'smsWebhookUrl' | 'smsWebhookSecret' | 'smsCodeTtlS' | 'embedded'>>(
  async (fastify, { smsWebhookUrl, smsWebhookSecret, smsCodeTtlS, embedded }) => {
    const sender =
      smsWebhookUrl === undefined ? logSender(fastify.log, embedded) : webhookSender(smsWebhookUrl, smsWebhookSecret)
    // Or whoever asks for a number that the gateway refuses could shut it for everybody.
    const gatewayFails = handleWhen((error) => !(error instanceof MessageRefused))
    const breaker = circuitBreaker(gatewayFails, {
      halfOpenAfter: pauseMs,
      breaker: new ConsecutiveBreaker(failuresMax)
    })

    fastify.decorate('sms', {
      async send(mobile, code) {
        // The breaker would let all others wait for the one that tries.
        if (breaker.state === CircuitState.HalfOpen) throw new Refusal('sms_gateway_unavailable')
        try {
          await breaker.execute(() => sender({ mobile, code, ttlSeconds: smsCodeTtlS, id: randomUUID() }))
        } catch (cause) {
          throw new Refusal('sms_gateway_unavailable', cause)
        }
      }
    } satisfies Sms)
  },
  { fastify: '5.x', name: 'sms' }
)
