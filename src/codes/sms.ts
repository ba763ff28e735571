import { randomUUID } from 'node:crypto'
import type { FastifyBaseLogger } from 'fastify'
import type { Config } from '../config/config.js'
import { maskMobiles } from '../telemetry/log.js'
import type { Observer } from '../telemetry/observer.js'
import { GatewayBreaker } from './gateway-breaker.js'
import { MessageNotSent, MessageRefused, type SmsMessage, type SmsSender } from './senders/sender.js'
import { webhookSender } from './senders/webhook.js'

export type Sms = ReturnType<typeof createSms>

export function createSms(
  { smsWebhookUrl, smsWebhookSecret }: Config,
  log: FastifyBaseLogger,
  observer: Observer | undefined
) {
  // Without a gateway, a developer reads the code from Redis.
  const logMessage: SmsSender = async ({ mobile }) => {
    log.info({ mobile: maskMobiles(mobile) }, 'no SMS is sent: SMS_WEBHOOK_URL is unset')
  }
  const send = smsWebhookUrl === undefined ? logMessage : webhookSender(smsWebhookUrl, smsWebhookSecret)
  const breaker = new GatewayBreaker()
  function record(mobile: string, hasFailed: boolean): void {
    if (breaker.record(mobile, hasFailed)) log.warn('the SMS gateway keeps failing, and gets no messages for 5 s')
  }

  return {
    /** 0, or the seconds until a gateway that keeps failing gets messages again. */
    pauseSeconds: () => Math.ceil(breaker.remainingPauseMs / 1_000),
    /**
     * Sends a code to a mobile.
     *
     * @throws {MessageNotSent} if the message was certainly not sent; after any other error it may have been
     */
    async send(message: Omit<SmsMessage, 'id'>): Promise<void> {
      const { mobile } = message
      try {
        await send({ ...message, id: randomUUID() })
      } catch (error) {
        // A number that the gateway refuses says nothing about the gateway.
        record(mobile, !(error instanceof MessageRefused))
        if (!(error instanceof MessageNotSent)) observer?.onCodeSent()
        throw error
      }
      record(mobile, false)
      observer?.onCodeSent()
    }
  }
}
