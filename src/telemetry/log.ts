import { writeSync } from 'node:fs'
import { type FastifyBaseLogger, type FastifyReply, type FastifyRequest, LogController } from 'fastify'
import { stdSerializers } from 'pino'
import { sampler } from './sampled-warnings.js'

declare module 'fastify' {
  interface FastifyRequest {
    /** The id of the OpenTelemetry trace; only while tracing is on. */
    traceId?: string
  }
}

/** A mobile number anywhere in a text. */
const mobileNumbers = /1[3-9]\d{9}/g

/** Masks every mobile number in a text, as `138****5678`. */
export function maskMobiles(text: string, pattern = mobileNumbers): string {
  return text.replace(pattern, (mobile) => `${mobile.slice(0, 3)}****${mobile.slice(-4)}`)
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

/** For every logger of this service. Nothing else removes secrets from errors. Without a message pino takes that of the error. */
export const serializers = { err: serializeError, msg: (message: unknown) => redact(`${message}`) }

/** How long a log line may wait to be written together with others. */
const flushIntervalMs = 100

/** So many characters are written at once. One write for each line took 5 % of the event loop's time. */
const flushAtLength = 4_096

/** Lines are dropped when so many characters wait, because nobody reads standard output. */
const waitingMaxLength = 16 * 1_024 * 1_024

/**
 * JSON lines on standard output. Lines that cannot be written (a full disk, a closed pipe) are dropped, and the next ones say how
 * many. A write neither blocks nor takes a thread of libuv's pool: in a pipe that nobody reads it would hold up the hashes.
 */
export function jsonLog() {
  // This makes a pipe non-blocking. The stream itself is not used, because an error ends it.
  const { fd } = process.stdout
  let lines = ''
  /** What is being written. If lines were dropped before, it ends with their number. */
  let chunk: Buffer = Buffer.alloc(0)
  let [droppedCount, reportedCount] = [0, 0]
  let isMidLine = false

  function nextChunk(): Buffer {
    const report = { level: 40, time: Date.now(), dropped: droppedCount, msg: 'log lines could not be written' }
    const text = `${isMidLine ? '\n' : ''}${lines}${droppedCount > 0 ? `${JSON.stringify(report)}\n` : ''}`
    reportedCount = droppedCount
    droppedCount = 0
    lines = ''
    return Buffer.from(text)
  }

  /** @returns whether no line waits any more */
  function flush(): boolean {
    try {
      while (chunk.length > 0 || lines !== '') {
        if (chunk.length === 0) chunk = nextChunk()
        const writtenBytes = writeSync(fd, chunk)
        isMidLine = chunk[writtenBytes - 1] !== 10
        chunk = chunk.subarray(writtenBytes)
      }
    } catch (error) {
      if (error instanceof Error && 'code' in error && error.code === 'EAGAIN') return false
      const lineCount = `${chunk}`.split('}\n').length - 1
      droppedCount += lineCount + (reportedCount > 0 ? reportedCount - 1 : 0)
      chunk = Buffer.alloc(0)
    }
    return true
  }
  setInterval(flush, flushIntervalMs).unref()

  return {
    flush,
    write(line: string): void {
      if (chunk.length + lines.length > waitingMaxLength) droppedCount++
      else lines += line
      if (chunk.length === 0 && lines.length >= flushAtLength) flush()
    }
  }
}

/** The outcomes that anybody can cause without end: of each, at most 100 lines a second are written. */
const sampledOutcomes = new Set<unknown>(['no_such_route', 'bad_request', 'not_logged_in'])
const sampleOutcome = sampler(100, 1_000)

/** Writes the line of a request. A sampled one says as `suppressed` how many like it were left out before it. */
export function logRequest(
  log: FastifyBaseLogger,
  line: { outcome: string | undefined; [field: string]: unknown }
): void {
  const suppressed = sampledOutcomes.has(line.outcome) ? sampleOutcome(`${line.outcome}`) : 0
  if (suppressed !== undefined) log.info({ ...line, ...(suppressed > 0 && { suppressed }) }, 'request')
}

/** Logs one line for each request when it ends. It has the route, not the URL, which may contain anything. */
export class RequestLog extends LogController {
  override incomingRequest(): void {}

  override requestCompleted(err: Error | null | undefined, request: FastifyRequest, reply: FastifyReply): void {
    if (request.routeOptions.config.isProbe) return
    logRequest(request.log, {
      ...(request.traceId !== undefined && { trace_id: request.traceId }),
      method: request.method,
      route: request.routeOptions.url,
      mobile: maskedMobileOf(request.body),
      status: reply.statusCode,
      outcome: reply.outcomeName,
      ms: Math.round(reply.elapsedTime * 10) / 10,
      ...(err && { err })
    })
  }
}

/** Returns the masked mobile of a body, or undefined if the field holds anything else: that may be a secret. */
function maskedMobileOf(body: unknown): string | undefined {
  if (typeof body !== 'object' || body === null || !('mobile' in body) || typeof body.mobile !== 'string')
    return undefined
  const masked = maskMobiles(body.mobile)
  return /^\d{3}\*{4}\d{4}$/.test(masked) ? masked : undefined
}
