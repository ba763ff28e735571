import { type FastifyReply, type FastifyRequest, LogController } from 'fastify'
import { type DestinationStream, destination, stdSerializers } from 'pino'
import type { Config } from '../config/config.js'

declare module 'fastify' {
  interface FastifyRequest {
    /** Of OpenTelemetry, where it is turned on. */
    traceId?: string
  }
}

/** A mobile number anywhere in a text. */
const mobiles = /1[3-9]\d{9}/g

/** Shows of a mobile number what a person recognises it by: `138****5678`. */
export function maskMobiles(text: string): string {
  return text.replace(mobiles, (mobile) => `${mobile.slice(0, 3)}****${mobile.slice(-4)}`)
}

/** Redis quotes the arguments of a command that it does not know. */
const publicText = (text: string) => maskMobiles(text.replace(/,? with args beginning with:.*/g, ''))

/**
 * A store's error as it may leave the service: no field but these, and no mobile. The original has the arguments of a
 * failed Redis command (`command.args`) and the key of a Postgres conflict (`detail`), and loggers print all there is.
 */
export function publicError(error: unknown): Error {
  if (!(error instanceof Error)) return new Error('not an error')
  const { name, code } = { code: undefined, ...error, name: error.name }
  const copy = new Error(publicText(error.message))
  return Object.assign(copy, { name, stack: publicText(error.stack ?? ''), ...(code !== undefined && { code }) })
}

/** How long a line of the log may wait for others to be written with. */
const flushMs = 100

/** JSON lines on standard output, several with one write: a write for each line was 5 % of the event loop's work. */
export function jsonLog(): DestinationStream {
  const stream = destination({ minLength: 4_096, periodicFlush: flushMs })
  process.once('exit', () => stream.flushSync())
  return stream
}

/** A logger's options, for JSON lines to a stream or else to standard output. */
export function loggerOptions({ logLevel }: Pick<Config, 'logLevel'>, stream?: DestinationStream) {
  return {
    level: logLevel,
    // Also for what did not come from a store.
    serializers: { err: (error: Error) => stdSerializers.err(publicError(error)) },
    ...(stream && { stream })
  }
}

/**
 * One line for each request, as it ends. The route stands for the URL, which may hold anything, and the mobile is masked.
 */
export class RequestLog extends LogController {
  override incomingRequest(): void {}

  override requestCompleted(err: Error | null | undefined, request: FastifyRequest, reply: FastifyReply): void {
    if (request.routeOptions.config.probe) return
    request.log.info(
      {
        reqId: request.id,
        ...(request.traceId !== undefined && { trace_id: request.traceId }),
        method: request.method,
        route: request.routeOptions.url,
        mobile: mobileOf(request.body),
        status: reply.statusCode,
        outcome: reply.outcomeName,
        ms: Math.round(reply.elapsedTime * 10) / 10,
        ...(err && { err })
      },
      'request'
    )
  }
}

/** The masked mobile of a request's body; undefined for a text that is none, which may be a secret in the wrong field. */
function mobileOf(body: unknown): string | undefined {
  if (typeof body !== 'object' || body === null || !('mobile' in body) || typeof body.mobile !== 'string')
    return undefined
  const masked = maskMobiles(body.mobile)
  return /^\d{3}\*{4}\d{4}$/.test(masked) ? masked : undefined
}

/** What a request id may look like: those of gateways and tracers, but with no mobile number in it. */
const saneRequestId = /^(?!.*(?<!\d)1[3-9]\d{9}(?!\d))[\w.:/+=-]{1,128}$/

/** The request id of the gateway if it is sane, else undefined. */
export function gatewayRequestId(header: string | string[] | undefined): string | undefined {
  return typeof header === 'string' && saneRequestId.test(header) ? header : undefined
}
