import { STATUS_CODES } from 'node:http'
import type { Socket } from 'node:net'
import type { FastifyInstance, FastifyReply, FastifyRequest } from 'fastify'
import fp from 'fastify-plugin'
import type { Config } from '../config/config.js'
import { type Language, outcomes } from '../outcomes.js'
import type { RequestLog } from '../telemetry/log.js'

const jsonType = 'application/json; charset=utf-8'

/** The envelope where no reply can be decorated, in the default language. */
function badRequestBody(language: Language): string {
  const { errno, [language]: errmsg } = outcomes.bad_request
  return JSON.stringify({ errno, errmsg })
}

/** The two handlers of Fastify's options that answer what never becomes a request. */
export function badRequestHandlers({ defaultLanguage }: Config, requestLog: RequestLog) {
  const body = badRequestBody(defaultLanguage)
  return {
    /** Answers bytes that Node cannot parse as HTTP. Fastify calls it with the instance as `this`. */
    clientErrorHandler(this: FastifyInstance | undefined, error: NodeJS.ErrnoException, socket: Socket) {
      // An earlier request on this socket is unanswered; bytes written now would be read as its response.
      if (this?.shutdown.hasUnansweredRequest(socket)) socket.destroy()
      else refuseSocket(socket, statusOf(error), body)
    },
    /** Answers a URL that cannot be decoded. Fastify neither decorates this reply nor logs the request. */
    frameworkErrors(_error: unknown, request: FastifyRequest, reply: FastifyReply) {
      reply.outcomeName = 'bad_request'
      reply.header('x-request-id', request.id).code(400).type(jsonType).send(body)
      requestLog.requestCompleted(null, request, reply)
    }
  }
}

/** Answers in the envelope what Node would answer by itself without one. */
export const badRequests = fp<{ config: Config }>(
  async (fastify, { config }) => {
    const body = badRequestBody(config.defaultLanguage)
    fastify.server.on('checkExpectation', (_request, response) => refuseSocket(response.socket, 417, body))
    fastify.server.on('connect', (_request, socket: Socket) => refuseSocket(socket, 400, body))
    fastify.addHook('onRequest', async (request, reply) => {
      // RFC 9112, section 3.2. Node's own check is off (`requireHostHeader`).
      if (request.headers.host === undefined && request.raw.httpVersion === '1.1') return reply.outcome('bad_request')
    })
    fastify.setNotFoundHandler((_request, reply) => reply.outcome('no_such_route'))
  },
  { fastify: '5.x', name: 'bad-requests', dependencies: ['replies'] }
)

function refuseSocket(socket: Socket | null, status: number, body: string): void {
  if (socket === null || !socket.writable) return
  socket.end(
    `HTTP/1.1 ${status} ${STATUS_CODES[status]}\r\nContent-Type: ${jsonType}\r\n` +
      `Content-Length: ${Buffer.byteLength(body)}\r\nConnection: close\r\n\r\n${body}`
  )
}

function statusOf({ code }: NodeJS.ErrnoException): number {
  if (code === 'ERR_HTTP_REQUEST_TIMEOUT') return 408
  return code === 'HPE_HEADER_OVERFLOW' ? 431 : 400
}
