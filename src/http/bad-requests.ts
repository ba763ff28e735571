import { randomUUID } from 'node:crypto'
import { type IncomingMessage, STATUS_CODES } from 'node:http'
import { isIPv6, type Socket } from 'node:net'
import type { FastifyBaseLogger, FastifyInstance, FastifyReply, FastifyRequest } from 'fastify'
import fp from 'fastify-plugin'
import type { Config } from '../config/config.js'
import { outcomes } from '../outcomes.js'
import { logRequest, type RequestLog } from '../telemetry/log.js'
import { refused } from './connections.js'
import { headersOfReply } from './reply-headers.js'

/**
 * How long a client may take to close its side of a refused connection. Node's server waits for that without a limit, so a
 * client could keep the file descriptor.
 */
const closingGraceMs = 1_000

/** The headers where no reply can be decorated. */
const badRequestHeaders = (requestId: string, body: string) => ({
  'content-type': 'application/json; charset=utf-8',
  'content-length': Buffer.byteLength(body),
  ...headersOfReply(requestId)
})

/** The most header lines of a request. Browsers and gateways send about thirty. */
const headerLinesMax = 200

/** Returns the status with which the head of a request is refused, or undefined. Node's own check of Host is off. */
function statusOfHead({ rawHeaders, headers, httpVersion }: IncomingMessage): number | undefined {
  if (rawHeaders.length > 2 * headerLinesMax) return 431
  // RFC 9112, section 3.2. Of two lines Node would keep the first.
  const hostLines = rawHeaders.filter((name, index) => index % 2 === 0 && /^host$/i.test(name)).length
  if (hostLines > 1 || (hostLines === 0 && httpVersion === '1.1')) return 400
  return headers.host === undefined || isHost(headers.host) ? undefined : 400
}

/** Whether a text is a host name or an IP address, with or without a port. */
function isHost(text: string): boolean {
  const [, address] = /^\[(.*)\](?::\d{1,5})?$/.exec(text) ?? []
  return address === undefined ? /^[\w.-]+(?::\d{1,5})?$/.test(text) : isIPv6(address)
}

/** The two handlers of Fastify's options that answer what never becomes a request. */
export function badRequestHandlers({ defaultLanguage }: Config, requestLog: RequestLog) {
  const { errno, [defaultLanguage]: errmsg } = outcomes.bad_request
  const body = JSON.stringify({ errno, errmsg })
  return {
    /**
     * Answers what never becomes a request, such as bytes that are not HTTP, and closes the connection. Fastify calls it with the
     * instance as `this`.
     */
    async clientErrorHandler(
      this: FastifyInstance | undefined,
      error: NodeJS.ErrnoException,
      socket: Socket
    ): Promise<void> {
      // After bytes that it cannot parse, Node reports an error for all that follow on the connection, too.
      if (refused.has(socket)) return
      refused.add(socket)
      // Bytes that are written before would be read as the response of an earlier request.
      await this?.connections.untilAnswered(socket)
      refuseSocket(socket, statusesByCode[error.code ?? ''] ?? 400, body, this?.log)
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
export const badRequests = fp(
  async (fastify) => {
    const { server } = fastify
    server.on('checkExpectation', ({ socket }: IncomingMessage) => {
      server.emit('clientError', { code: 'UNKNOWN_EXPECTATION' }, socket)
    })
    server.on('connect', (_request, socket: Socket) => {
      // Node has removed its listeners. Without one for `error`, a reset ends the process. Without `resume`, the client's FIN
      // is not noticed behind bytes that nobody reads.
      socket.on('error', () => undefined).resume()
      server.emit('clientError', { code: 'CONNECT' }, socket)
    })
    fastify.addHook('onRequest', (request, reply, done) => {
      const status = statusOfHead(request.raw)
      if (status === undefined) done()
      else reply.outcome('bad_request', { status })
    })
    fastify.setNotFoundHandler((_request, reply) => reply.outcome('no_such_route'))
  },
  { fastify: '5.x', name: 'bad-requests', dependencies: ['replies', 'connections'] }
)

function refuseSocket(socket: Socket, status: number, body: string, log: FastifyBaseLogger | undefined): void {
  // The client has disconnected.
  if (!socket.writable) return
  const requestId = randomUUID()
  // As any other, the id of the reply is in the log.
  if (log) logRequest(log, { reqId: requestId, status, outcome: 'bad_request' })
  const headers = Object.entries({ ...badRequestHeaders(requestId, body), connection: 'close' })
  const head = [`HTTP/1.1 ${status} ${STATUS_CODES[status]}`, ...headers.map(([name, value]) => `${name}: ${value}`)]
  socket.end(`${head.join('\r\n')}\r\n\r\n${body}`)
  setTimeout(() => socket.destroy(), closingGraceMs).unref()
}

const statusesByCode: Partial<Record<string, number>> = {
  ERR_HTTP_REQUEST_TIMEOUT: 408,
  UNKNOWN_EXPECTATION: 417,
  HPE_HEADER_OVERFLOW: 431
}
