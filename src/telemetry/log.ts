import { type FastifyReply, type FastifyRequest, LogController } from 'fastify'
import { type DestinationStream, destination, type LogFn, type Logger, stdSerializers } from 'pino'
import type { Config } from '../config/config.js'
import { Refusal } from '../outcomes.js'

declare module 'fastify' {
  interface FastifyRequest {
    /** The id of the OpenTelemetry trace; only while tracing is on. */
    traceId?: string
  }
}

/** A mobile number anywhere in a text. */
const mobileNumbers = /1[3-9]\d{9}/g

/** Masks every mobile number in a text, as `138****5678`. */
export function maskMobiles(text: string): string {
  return text.replace(mobileNumbers, (mobile) => `${mobile.slice(0, 3)}****${mobile.slice(-4)}`)
}

/** Removes what must not be logged. Redis quotes the arguments of an unknown command, codes included. */
const redact = (text: string) => maskMobiles(text.replace(/,? with args beginning with:.*/g, ''))

/**
 * Returns what is logged of an error and its causes. Their other fields may hold secrets: a Redis error has the arguments of
 * its command (`command.args`), a Postgres conflict its key (`detail`).
 */
function serializeError(error: unknown) {
  const { type, message, stack, code } = stdSerializers.err(error instanceof Error ? error : new Error('not an error'))
  return { type, message: redact(message), stack: redact(stack), code }
}

/** For every logger of this service. Nothing else removes secrets from errors. */
export const serializers = { err: serializeError }

/** How long a log line may wait to be written together with others. */
const flushIntervalMs = 100

/** Lines are dropped when so many bytes wait, because nobody reads standard output. */
const waitingMaxBytes = 16 * 1_024 * 1_024

/**
 * JSON lines on standard output, several in one write: one write for each line took 5 % of the event loop's time. Call `flush`
 * before the process ends.
 */
export function jsonLog() {
  const stream = destination({ minLength: 4_096, maxLength: waitingMaxBytes, periodicFlush: flushIntervalMs })
  // pino calls it when the process ends, and after a fatal line. sonic-boom repeats a failing write for ever in it, even if the
  // reader has gone.
  stream.flushSync = () => undefined
  return stream
}

/** For how long the lines of a kind about a failing store are counted instead of logged, after one was. */
const sampleIntervalMs = 10_000

/** More kinds than a service has, unless messages of a store contain something of a request. */
const sampledKindsMax = 100

/** The fields and the message of a log line, as pino gets them. */
type LogArguments = Parameters<LogFn>

/** Returns the kind of a line about a failing store, or undefined for any other line. */
function storeFailureKind([fields, message]: LogArguments): string | undefined {
  if (typeof fields !== 'object' || fields === null) return undefined
  const { err, outcome, store, method, route }: Record<string, unknown> = { ...fields }
  if (outcome === 'storage_unavailable') return `${method} ${route}`
  const isRefusal = err instanceof Refusal && err.outcome === 'storage_unavailable'
  if (!isRefusal && store === undefined && message !== 'storage_unavailable') return undefined
  return err instanceof Error ? `${message}: ${err.message}` : message
}

/**
 * Returns a hook of pino that logs one line in 10 s of each kind about a failing store. Otherwise the log would grow with the
 * traffic while a store is away. After the 10 s a line with `suppressed` has the number of the others.
 */
function sampleStoreFailures() {
  const suppressedByKind = new Map<string, number>()
  return function logMethod(this: Logger, args: LogArguments, method: LogFn): void {
    const kind = storeFailureKind(args)
    if (kind === undefined) {
      method.apply(this, args)
      return
    }
    const sampled = suppressedByKind.has(kind) || suppressedByKind.size < sampledKindsMax ? kind : 'other kinds'
    const suppressed = suppressedByKind.get(sampled)
    if (suppressed !== undefined) {
      suppressedByKind.set(sampled, suppressed + 1)
      return
    }
    suppressedByKind.set(sampled, 0)
    method.apply(this, args)
    setTimeout(() => {
      const count = suppressedByKind.get(sampled)
      suppressedByKind.delete(sampled)
      if (count) method.apply(this, [{ suppressed: count }, sampled])
    }, sampleIntervalMs).unref()
  }
}

/** Returns the logger's options. Without a stream the lines go to standard output. */
export function loggerOptions({ logLevel }: Config, stream?: DestinationStream) {
  return {
    level: logLevel,
    hooks: { logMethod: sampleStoreFailures() },
    serializers,
    ...(stream && { stream })
  }
}

/** Logs one line for each request when it ends. It has the route, not the URL, which may contain anything. */
export class RequestLog extends LogController {
  override incomingRequest(): void {}

  override requestCompleted(err: Error | null | undefined, request: FastifyRequest, reply: FastifyReply): void {
    if (request.routeOptions.config.isProbe) return
    request.log.info(
      {
        reqId: request.id,
        ...(request.traceId !== undefined && { trace_id: request.traceId }),
        method: request.method,
        route: request.routeOptions.url,
        mobile: maskedMobileOf(request.body),
        status: reply.statusCode,
        outcome: reply.outcomeName,
        ms: Math.round(reply.elapsedTime * 10) / 10,
        ...(err && { err })
      },
      'request'
    )
  }
}

/** Returns the masked mobile of a body, or undefined if the field holds anything else: that may be a secret. */
function maskedMobileOf(body: unknown): string | undefined {
  if (typeof body !== 'object' || body === null || !('mobile' in body) || typeof body.mobile !== 'string')
    return undefined
  const masked = maskMobiles(body.mobile)
  return /^\d{3}\*{4}\d{4}$/.test(masked) ? masked : undefined
}
