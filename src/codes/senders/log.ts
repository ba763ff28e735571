import type { FastifyBaseLogger } from 'fastify'
import { maskMobiles } from '../../telemetry/log.js'
import type { SmsSender } from './sender.js'

/**
 * Sends nothing and logs that. The log line has the code only with the private stores of a first run. With other stores a
 * developer reads the code from Redis.
 */
export function logSender(log: FastifyBaseLogger, showCodes: boolean): SmsSender {
  return async ({ mobile, code }) => {
    log.info({ mobile: maskMobiles(mobile), ...(showCodes && { code }) }, 'SMS code')
  }
}
