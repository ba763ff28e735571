import { randomUUID } from 'node:crypto'
import { STATUS_CODES } from 'node:http'
import type { Socket } from 'node:net'
import Fastify, { type FastifyInstance, type FastifyPluginAsync, type FastifyReply, type FastifyRequest } from 'fastify'
import fp from 'fastify-plugin'
import type { DestinationStream } from 'pino'
import { codes } from './codes/codes.js'
import { smsCodeRoutes } from './codes/routes.js'
import { sms } from './codes/sms.js'
import { bodyMaxBytes, type Config } from './config/config.js'
import { signUpPage } from './dev/sign-up-page.js'
import { envelope } from './http/envelope.js'
import { healthRoutes } from './http/health.js'
import { description } from './http/openapi.js'
import { connections } from './http/shutdown.js'
import { work } from './http/work.js'
import { outcomes } from './outcomes.js'
import { passwords } from './passwords/passwords.js'
import { sessionRoutes } from './sessions/routes.js'
import { sessions } from './sessions/sessions.js'
import { postgres } from './stores/postgres.js'
import { throttles } from './stores/rate-limits.js'
import { redis } from './stores/redis.js'
import { gatewayRequestId, loggerOptions, RequestLog } from './telemetry/log.js'
import { metrics } from './telemetry/metrics.js'
import { userRoutes } from './users/redeem-code.js'
import { users } from './users/users.js'

const jsonType = 'application/json; charset=utf-8'

/** How long a request may take to arrive. */
const requestTimeoutMs = 10_000

/**
 * The sign-up routes with all that they need, for any Fastify 5 application: `register(signUp, { prefix, config })`.
 * Its error handler, validator and stores are its own and do not leave its scope.
 */
export const signUp: FastifyPluginAsync<{ config: Config }> = async (fastify, { config }) => {
  await fastify.register(envelope, config)
  await fastify.register(capabilities, config)
  await fastify.register(routes, { config })
}

/** What the routes need, on the instance. */
const capabilities = fp<Config>(async (fastify, config) => {
  await fastify.register(postgres, config)
  await fastify.register(redis, config)
  await fastify.register(codes, config)
  await fastify.register(passwords, config)
  await fastify.register(users)
  await fastify.register(sessions, config)
  await fastify.register(throttles)
  await fastify.register(work)
  if (config.sms) await fastify.register(sms, config)
})

const routes: FastifyPluginAsync<{ config: Config }> = async (fastify, { config }) => {
  await fastify.register(userRoutes, { passwordMin: config.passwordMin })
  await fastify.register(sessionRoutes)
  if (config.sms) await fastify.register(smsCodeRoutes, config)
}

/** Builds the service, ready to listen. The log goes to standard output, or to a stream as JSON lines. */
export async function buildApp(config: Config, logStream?: DestinationStream): Promise<FastifyInstance> {
  const { bad_request } = outcomes
  const badRequest = JSON.stringify({ errno: bad_request.errno, errmsg: bad_request[config.defaultLanguage] })

  const requestLog = new RequestLog()
  const app = Fastify({
    logger: loggerOptions(config, logStream),
    logController: requestLog,
    // A child logger for each request costs more than its one line: that names the request itself.
    childLoggerFactory: (logger) => logger,
    genReqId: ({ headers }) => gatewayRequestId(headers['x-request-id']) ?? randomUUID(),
    ...(config.trustProxy.length > 0 && { trustProxy: [...config.trustProxy] }),
    bodyLimit: bodyMaxBytes,
    // A gateway sends its 4 KiB at once; this ends what trickles. Node looks only as often as its interval says, and
    // takes the longer of the two timeouts.
    requestTimeout: requestTimeoutMs,
    // Longer than the plugins' own wait for the stores.
    pluginTimeout: 20_000,
    // Answered in the envelope by plugins/connections.ts.
    return503OnClosing: false,
    http: { requireHostHeader: false, headersTimeout: requestTimeoutMs, connectionsCheckingInterval: 1_000 },
    clientErrorHandler(error, socket) {
      // What stands before the answer of another request would be taken for that answer.
      if (app.connections.isBusy(socket)) socket.destroy()
      else refuseSocket(socket, socketErrorStatus(error), badRequest)
    },
    // A URL that cannot be decoded. Fastify neither decorates the reply nor logs the request.
    frameworkErrors(_error, request: FastifyRequest, reply: FastifyReply) {
      reply.outcomeName = 'bad_request'
      reply.header('x-request-id', request.id).code(400).type(jsonType).send(badRequest)
      requestLog.requestCompleted(null, request, reply)
    }
  })

  // Node answers these two itself, outside the envelope, unless somebody listens.
  app.server.on('checkExpectation', (_request, response) => refuseSocket(response.socket, 417, badRequest))
  app.server.on('connect', (_request, socket: Socket) => refuseSocket(socket, 400, badRequest))

  app.addHook('onRequest', (request, reply, done) => {
    reply.header('x-request-id', request.id)
    done()
  })
  await app.register(envelope, config)
  await app.register(connections)
  app.setNotFoundHandler((_request, reply) => reply.outcome('no_such_route'))
  app.addHook('onRequest', async (request, reply) => {
    // RFC 9112, 3.2. Node's own check is off because its answer has no envelope.
    if (request.headers.host === undefined && request.raw.httpVersion === '1.1') return reply.outcome('bad_request')
  })
  await app.register(capabilities, config)
  await app.register(description, config)
  if (config.metricsPort !== undefined) await app.register(metrics, config)
  await app.register(routes, { prefix: config.apiPrefix, config })
  await app.register(healthRoutes)
  if (config.embedded) await app.register(signUpPage, config)
  await app.ready()
  return app
}

/** Answers on a bare socket what Node could not read as HTTP. */
function refuseSocket(socket: Socket | null, status: number, body: string): void {
  if (socket === null || !socket.writable) return
  socket.end(
    `HTTP/1.1 ${status} ${STATUS_CODES[status]}\r\nContent-Type: ${jsonType}\r\n` +
      `Content-Length: ${Buffer.byteLength(body)}\r\nConnection: close\r\n\r\n${body}`
  )
}

function socketErrorStatus({ code }: NodeJS.ErrnoException): number {
  if (code === 'ERR_HTTP_REQUEST_TIMEOUT') return 408
  return code === 'HPE_HEADER_OVERFLOW' ? 431 : 400
}
