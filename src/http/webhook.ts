import { createHmac } from 'node:crypto'
import http from 'node:http'
import https from 'node:https'
import { TLSSocket } from 'node:tls'

/** The time for both attempts together. Events rely on it: less than the 6 s until their next delivery (events/delivery.ts). */
const timeoutMs = 5_000

/** Each address of the receiver but the last has this time to connect. Node's 250 ms are short for one that is far away. */
const addressTimeout = { autoSelectFamilyAttemptTimeout: timeoutMs / 2 }

/** Codes for a connection that broke before an answer. */
const brokenConnections: ReadonlySet<string> = new Set(['ECONNRESET', 'EPIPE', 'ETIMEDOUT'])

/** How much of an answer is read, so that its connection can be reused. */
const answerMaxBytes = 65_536

/** What became of a message. */
export interface WebhookResult {
  /** Of the answer. Undefined: there was none. */
  status: number | undefined
  /** Whether the status is 2xx. */
  isAccepted: boolean
  /** Whether the receiver may have got the message in an attempt that has no answer. */
  mayHaveArrived: boolean
  /** For the log: `answered 500`, or `did not answer: ECONNRESET` with a code of the system, of TLS or of the HTTP parser. */
  summary: string
}

/**
 * POSTs a message as JSON, and once more if no connection is made, or one breaks before an answer. With a secret the request is signed.
 * Resolves also if the receiver fails.
 *
 * @param id the same for each attempt to deliver the same message, so that a receiver can drop duplicates
 */
export async function postWebhook(
  url: string,
  secret: string | undefined,
  id: string,
  message: object
): Promise<WebhookResult> {
  const body = JSON.stringify(message)
  const deadline = performance.now() + timeoutMs
  const post = () => {
    const signature = secret === undefined ? undefined : signatureHeaders(secret, id, body)
    return postOnce(url, { 'content-type': 'application/json', 'webhook-id': id, ...signature }, body, deadline)
  }
  const { mayRepeat, result } = await post()
  if (!mayRepeat) return result
  const { result: second } = await post()
  return { ...second, mayHaveArrived: result.mayHaveArrived || second.mayHaveArrived }
}

function postOnce(
  url: string,
  headers: http.OutgoingHttpHeaders,
  body: string,
  deadline: number
): Promise<{ result: WebhookResult; mayRepeat: boolean }> {
  const { request: open } = new URL(url).protocol === 'https:' ? https : http
  return new Promise((resolve) => {
    const request = open(url, { method: 'POST', headers, ...addressTimeout })
    let wasWritten = false
    let isLate = false
    // Not AbortSignal.timeout(), which took half of the CPU time of a request.
    const timer = setTimeout(() => {
      isLate = true
      request.destroy()
    }, deadline - performance.now())
    function write(): void {
      wasWritten = true
      request.end(body)
    }
    request.once('socket', (socket) => {
      // Not before the certificate is verified. So this one place knows whether anybody can have read the message.
      // A connection that is used again, and one through an outgoing proxy, is open already.
      const isTls = socket instanceof TLSSocket
      if (isTls ? socket.getPeerFinished() !== undefined : !socket.connecting) write()
      else socket.once(isTls ? 'secureConnect' : 'connect', write)
    })
    request.once('response', (response) => {
      const { statusCode: status = 0 } = response
      const isAccepted = status >= 200 && status < 300
      resolve({
        result: { status, isAccepted, mayHaveArrived: false, summary: `answered ${status}` },
        mayRepeat: false
      })
      // Only the status counts. The body is read so that the connection can be reused.
      let bytes = 0
      response.on('error', () => undefined)
      response.on('data', (chunk: Buffer) => {
        bytes += chunk.length
        if (bytes > answerMaxBytes) response.destroy()
      })
    })
    function fail(error?: unknown): void {
      const code = isLate ? 'timeout' : codeOf(error)
      const summary = `did not answer: ${code}`
      // After a timeout no time is left. A receiver that did not speak HTTP may have the message already.
      const mayRepeat = !isLate && (!wasWritten || brokenConnections.has(code))
      resolve({ result: { status: undefined, isAccepted: false, mayHaveArrived: wasWritten, summary }, mayRepeat })
    }
    request.on('error', fail)
    request.once('close', () => {
      clearTimeout(timer)
      fail()
    })
  })
}

const codeOf = (error: unknown): string => (error instanceof Error && 'code' in error ? `${error.code}` : 'unknown')

/**
 * Returns the headers by which a receiver verifies that a webhook is from this service, as Standard Webhooks says
 * (https://www.standardwebhooks.com). Libraries in many languages verify them.
 *
 * @param secret `whsec_<base64>`, or any other text, whose bytes are the key
 */
export function signatureHeaders(secret: string, id: string, body: string) {
  const key = secret.startsWith('whsec_') ? Buffer.from(secret.slice('whsec_'.length), 'base64') : secret
  const seconds = Math.floor(Date.now() / 1_000)
  const mac = createHmac('sha256', key).update(`${id}.${seconds}.${body}`).digest('base64')
  return { 'webhook-id': id, 'webhook-timestamp': `${seconds}`, 'webhook-signature': `v1,${mac}` }
}
