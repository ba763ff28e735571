import type { Server } from 'node:http'
import type { FastifyHttpOptions } from 'fastify'
import type { DestinationStream } from 'pino'
import type { Config } from '../config/config.js'
import { RequestLog, serializers } from '../telemetry/log.js'
import { badRequestHandlers } from './bad-requests.js'
import { trustedProxies } from './forwarded-for.js'
import { requestIdOf } from './reply-headers.js'

/** How long a request may take to arrive. A gateway sends its few KiB at once. */
const requestTimeoutMs = 10_000

/** Longer than a start waits for both stores (`stores/wait-for-store.ts`) and for the first hash. */
const pluginTimeoutMs = 60_000

/**
 * Returns all options of the Fastify instance.
 *
 * @param logStream receives the log as JSON lines; by default it goes to standard output
 */
export function serverOptions(config: Config, logStream?: DestinationStream) {
  const requestLog = new RequestLog()
  return {
    logger: { level: config.logLevel, serializers, ...(logStream && { stream: logStream }) },
    logController: requestLog,
    genReqId: requestIdOf,
    ...(config.trustProxy.length > 0 && { trustProxy: trustedProxies(config) }),
    requestTimeout: requestTimeoutMs,
    keepAliveTimeout: config.keepAliveTimeoutMs,
    pluginTimeout: pluginTimeoutMs,
    // http/lifecycle.ts answers these requests in the envelope.
    return503OnClosing: false,
    http: {
      // http/bad-requests.ts answers a missing Host in the envelope.
      requireHostHeader: false,
      // Node uses the larger of headersTimeout and requestTimeout, and checks only once in an interval.
      headersTimeout: requestTimeoutMs,
      connectionsCheckingInterval: 1_000
    },
    ...badRequestHandlers(config, requestLog)
  } satisfies FastifyHttpOptions<Server>
}
