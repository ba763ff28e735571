import { createHmac } from 'node:crypto'
import { MessageNotSent, MessageRefused, type SmsSender } from './sender.js'

/** The time for both attempts together. */
const timeoutMs = 5_000

/** Codes for a connection that broke before an answer. The message may have been sent. */
const brokenConnections: ReadonlySet<string> = new Set(['ECONNRESET', 'EPIPE', 'ETIMEDOUT', 'UND_ERR_SOCKET'])

/** How much of an answer is read, so that its connection can be reused. */
const answerMaxBytes = 65_536

/**
 * POSTs each message as JSON, `{mobile, code, ttl_s, id}`. With a secret the request is signed:
 * `X-Signature: t=<unix seconds>,v1=<hex HMAC-SHA256 of "<t>.<body>">`.
 */
export function webhookSender(url: string, secret: string | undefined): SmsSender {
  return async ({ mobile, code, ttlSeconds, id }) => {
    const body = JSON.stringify({ mobile, code, ttl_s: ttlSeconds, id })
    const signal = AbortSignal.timeout(timeoutMs)
    const post = () =>
      fetch(url, {
        method: 'POST',
        headers: {
          'content-type': 'application/json',
          ...(secret !== undefined && { 'x-signature': sign(body, secret) })
        },
        body,
        redirect: 'manual',
        signal
      })
    let mayBeSent = false
    const response = await post()
      .catch((error) => {
        mayBeSent = !hasNotConnected(error)
        // A receiver that was too slow, or did not speak HTTP, may have sent the message already.
        if (signal.aborted || (mayBeSent && !brokenConnections.has(errorCodeOf(error)))) throw error
        return post()
      })
      .catch((error) => {
        const message = `the SMS webhook did not answer: ${signal.aborted ? 'timeout' : errorCodeOf(error)}`
        throw mayBeSent || !hasNotConnected(error) ? new Error(message) : new MessageNotSent(message)
      })
    // Only the status counts. The body is read so that the connection can be reused.
    await drain(response).catch(() => undefined)
    if (response.ok) return
    const { status } = response
    const message = `the SMS webhook answered ${status}`
    const isRefusal = status >= 400 && status < 500 && !mayBeSent
    throw isRefusal ? new MessageRefused(message) : new Error(message)
  }
}

/** Whether fetch failed before it sent anything: the name was not found, or no connection was made to any address. */
function hasNotConnected(error: unknown): boolean {
  const cause = causeOf(error)
  const attempts: unknown[] = cause instanceof AggregateError ? cause.errors : [cause]
  return attempts.every(
    (attempt) =>
      typeof attempt === 'object' &&
      attempt !== null &&
      'syscall' in attempt &&
      (attempt.syscall === 'connect' || attempt.syscall === 'getaddrinfo')
  )
}

/** Returns why fetch failed: a code of the system, of undici or of its parser. */
function errorCodeOf(error: unknown): string {
  const cause = causeOf(error)
  return typeof cause === 'object' && cause !== null && 'code' in cause ? String(cause.code) : 'unknown'
}

const causeOf = (error: unknown): unknown => (error instanceof Error ? error.cause : undefined)

function sign(body: string, secret: string): string {
  const seconds = Math.floor(Date.now() / 1_000)
  return `t=${seconds},v1=${createHmac('sha256', secret).update(`${seconds}.${body}`).digest('hex')}`
}

async function drain({ body }: Response): Promise<void> {
  let bytes = 0
  for await (const chunk of body ?? []) {
    bytes += chunk.length
    if (bytes > answerMaxBytes) return
  }
}
