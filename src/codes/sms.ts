import { randomUUID } from 'node:crypto'
import fp from 'fastify-plugin'
import type { Config } from '../config/config.js'
import type { Observer } from '../telemetry/observer.js'
import { GatewayBreaker } from './gateway-breaker.js'
import { logSender } from './senders/log.js'
import { MessageNotSent, MessageRefused } from './senders/sender.js'
import { webhookSender } from './senders/webhook.js'

interface Sms {
  /** 0, or the seconds until a gateway that keeps failing gets messages again. */
  pauseSeconds(): number
  /**
   * Sends a code to a mobile.
   *
   * @throws {MessageNotSent} if the message was certainly not sent; after any other error it may have been
   */
  send(mobile: string, code: string, ttlSeconds: number): Promise<void>
}

declare module 'fastify' {
  interface FastifyInstance {
    sms: Sms
  }
}

export const sms = fp<{ config: Config; observer?: Observer | undefined }>(
  async (fastify, { config: { smsWebhookUrl, smsWebhookSecret }, observer }) => {
    const send = smsWebhookUrl === undefined ? logSender(fastify.log) : webhookSender(smsWebhookUrl, smsWebhookSecret)
    const breaker = new GatewayBreaker()
    function record(mobile: string, hasFailed: boolean): void {
      if (breaker.record(mobile, hasFailed))
        fastify.log.warn('the SMS gateway keeps failing, and gets no messages for 5 s')
    }

    fastify.decorate('sms', {
      pauseSeconds: () => Math.ceil(breaker.remainingPauseMs / 1_000),
      async send(mobile, code, ttlSeconds) {
        try {
          await send({ mobile, code, ttlSeconds, id: randomUUID() })
        } catch (error) {
          // A number that the gateway refuses says nothing about the gateway.
          record(mobile, !(error instanceof MessageRefused))
          if (!(error instanceof MessageNotSent)) observer?.onCodeSent()
          throw error
        }
        record(mobile, false)
        observer?.onCodeSent()
      }
    } satisfies Sms)
  },
  { fastify: '5.x', name: 'sms' }
)
