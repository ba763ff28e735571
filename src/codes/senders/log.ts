import type { FastifyBaseLogger } from 'fastify'
import { maskMobiles } from '../../telemetry/log.js'
import type { SmsSender } from './sender.js'

/**
 * Sends nothing. The code stands in the log only where the service brings its own stores, for a first look at it:
 * elsewhere whoever develops reads it from Redis.
 */
export function logSender(log: FastifyBaseLogger, showCodes: boolean): SmsSender {
  return async ({ mobile, code }) => {
    log.info({ mobile: maskMobiles(mobile), ...(showCodes && { code }) }, 'SMS code')
  }
}
