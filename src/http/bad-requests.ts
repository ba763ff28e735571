import { randomUUID } from 'node:crypto'
import { STATUS_CODES } from 'node:http'
import type { Socket } from 'node:net'
import type { FastifyBaseLogger, FastifyInstance, FastifyReply, FastifyRequest } from 'fastify'
import fp from 'fastify-plugin'
import type { Config } from '../config/config.js'
import { type Language, type OutcomeName, outcomes } from '../outcomes.js'
import type { RequestLog } from '../telemetry/log.js'
import { headersOfReply } from './reply-headers.js'

/**
 * How long a client may take to close its side of a refused connection. Node's server waits for that without a limit, so a
 * client could keep the file descriptor.
 */
const closingGraceMs = 1_000

/** The envelope where no reply can be decorated, in the default language. */
function badRequestBody(language: Language): string {
  const { errno, [language]: errmsg } = outcomes.bad_request
  return JSON.stringify({ errno, errmsg })
}

/** The headers of a reply with that envelope. */
const badRequestHeaders = (requestId: string, body: string) => ({
  'content-type': 'application/json; charset=utf-8',
  'content-length': Buffer.byteLength(body),
  ...headersOfReply(requestId)
})

/** Logs a request that Fastify never sees, so that the id of its reply is in the log, as that of any other. */
function logRequest(log: FastifyBaseLogger | undefined, requestId: string, status: number): void {
  log?.info({ reqId: requestId, status, outcome: 'bad_request' satisfies OutcomeName }, 'request')
}

/** The two handlers of Fastify's options that answer what never becomes a request. */
export function badRequestHandlers({ defaultLanguage }: Config, requestLog: RequestLog) {
  const body = badRequestBody(defaultLanguage)
  /** After bytes that it cannot parse, Node reports an error for all that follow on the connection, too. */
  const refused = new WeakSet<Socket>()
  return {
    /** Answers bytes that Node cannot parse as HTTP. Fastify calls it with the instance as `this`. */
    async clientErrorHandler(
      this: FastifyInstance | undefined,
      error: NodeJS.ErrnoException,
      socket: Socket
    ): Promise<void> {
      if (refused.has(socket)) return
      refused.add(socket)
      // Bytes that are written before would be read as the response of an earlier request.
      await this?.shutdown.untilAnswered(socket)
      refuseSocket(socket, statusOf(error), body, this?.log)
    },
    /** Answers a URL that cannot be decoded. Fastify neither decorates this reply nor logs the request. */
    frameworkErrors(_error: unknown, request: FastifyRequest, reply: FastifyReply) {
      reply.outcomeName = 'bad_request'
      reply.headers(badRequestHeaders(request.id, body)).code(400).send(body)
      requestLog.requestCompleted(null, request, reply)
    }
  }
}

/** Answers in the envelope what Node would answer by itself without one. */
export const badRequests = fp<{ config: Config }>(
  async (fastify, { config }) => {
    const body = badRequestBody(config.defaultLanguage)
    fastify.server.on('checkExpectation', (_request, response) => {
      const requestId = randomUUID()
      response.writeHead(417, { ...badRequestHeaders(requestId, body), connection: 'close' }).end(body)
      logRequest(fastify.log, requestId, 417)
    })
    fastify.server.on('connect', async (_request, socket: Socket) => {
      // Node has removed its listeners. Without one for `error`, a reset ends the process. Without `resume`, the client's FIN
      // is not noticed behind bytes that nobody reads.
      socket.on('error', () => undefined).resume()
      await fastify.shutdown.untilAnswered(socket)
      refuseSocket(socket, 400, body, fastify.log)
    })
    fastify.addHook('onRequest', (request, reply, done) => {
      // RFC 9112, section 3.2. Node's own check is off (`requireHostHeader`).
      if (request.headers.host === undefined && request.raw.httpVersion === '1.1') reply.outcome('bad_request')
      else done()
    })
    fastify.setNotFoundHandler((_request, reply) => reply.outcome('no_such_route'))
  },
  { fastify: '5.x', name: 'bad-requests', dependencies: ['replies', 'shutdown'] }
)

function refuseSocket(socket: Socket, status: number, body: string, log: FastifyBaseLogger | undefined): void {
  // The client has disconnected.
  if (!socket.writable) return
  const requestId = randomUUID()
  logRequest(log, requestId, status)
  const headers = Object.entries({ ...badRequestHeaders(requestId, body), connection: 'close' })
  const head = [`HTTP/1.1 ${status} ${STATUS_CODES[status]}`, ...headers.map(([name, value]) => `${name}: ${value}`)]
  socket.end(`${head.join('\r\n')}\r\n\r\n${body}`)
  setTimeout(() => socket.destroy(), closingGraceMs).unref()
}

function statusOf({ code }: NodeJS.ErrnoException): number {
  if (code === 'ERR_HTTP_REQUEST_TIMEOUT') return 408
  return code === 'HPE_HEADER_OVERFLOW' ? 431 : 400
}
