import { createHmac } from 'node:crypto'
import { MessageRefused, type SmsSender } from './sender.js'

/** How long the receiver may take, both tries together. */
const timeoutMs = 5_000

/** What the system and undici call a connection that could not be made, or broke before an answer. */
const connectionFailures: ReadonlySet<string> = new Set([
  'EAI_AGAIN',
  'ECONNREFUSED',
  'ECONNRESET',
  'EHOSTUNREACH',
  'ENETUNREACH',
  'ENOTFOUND',
  'EPIPE',
  'ETIMEDOUT',
  'UND_ERR_CONNECT_TIMEOUT',
  'UND_ERR_SOCKET'
])

/** The most of an answer that is read, so that its connection can be used again. */
const answerMaxBytes = 65_536

/**
 * POSTs each message as JSON, `{mobile, code, ttl_s, id}`, to a URL. With a secret it is signed:
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
    const answer = await post()
      .catch((error) => {
        // A receiver that was too slow, or has answered with no HTTP, is not asked twice.
        if (signal.aborted || !connectionFailures.has(codeOf(error))) throw error
        return post()
      })
      .catch((error) => {
        throw new Error(`the SMS webhook gave no answer: ${signal.aborted ? 'timeout' : codeOf(error)}`)
      })
    // The status has decided; the rest only matters to the connection.
    await drain(answer).catch(() => undefined)
    if (answer.ok) return
    const { status } = answer
    if (status >= 400 && status < 500 && status !== 429) throw new MessageRefused(`the SMS webhook answered ${status}`)
    throw new Error(`the SMS webhook answered ${status}`)
  }
}

/** Why fetch has failed: a code of the system, of undici or of its parser. */
function codeOf(error: unknown): string {
  const cause = error instanceof Error ? error.cause : undefined
  return typeof cause === 'object' && cause !== null && 'code' in cause ? String(cause.code) : 'unknown'
}

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
