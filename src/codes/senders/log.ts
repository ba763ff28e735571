import type { FastifyBaseLogger } from 'fastify'
import { maskMobiles } from '../../telemetry/log.js'
import type { SmsSender } from './sender.js'

/** Sends nothing and logs that. Without a gateway, a developer reads the code from Redis. */
export function logSender(log: FastifyBaseLogger): SmsSender {
  return async ({ mobile }) => {
    log.info({ mobile: maskMobiles(mobile) }, 'no SMS is sent: SMS_WEBHOOK_URL is unset')
  }
}
