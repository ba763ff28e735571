import { createHmac } from 'node:crypto'
import http from 'node:http'
import https from 'node:https'
import { TLSSocket } from 'node:tls'

/** The time for both attempts together. */
const timeoutMs = 5_000

/** Each address of the receiver but the last has this time to connect. Node's 250 ms are short for one that is far away. */
const addressTimeout = { autoSelectFamilyAttemptTimeout: timeoutMs / 2 }

/** Codes for a connection that broke before an answer. */
const brokenConnections: ReadonlySet<string> = new Set(['ECONNRESET', 'EPIPE', 'ETIMEDOUT'])

const timeoutCode = 'timeout'

/** How much of an answer is read, so that its connection can be reused. */
const answerMaxBytes = 65_536

/** What became of a message. */
export interface WebhookResult {
  /** Of the answer. Undefined: there was none. */
  status: number | undefined
  /** Whether the status is 2xx. */
  isAccepted: boolean
  /** Whether the receiver may have got the message in an attempt that has no answer. */
  mayBeReceived: boolean
  /** For the log: `answered 500`, or `did not answer: ECONNRESET` with a code of the system, of TLS or of the HTTP parser. */
  outcome: string
}

/**
 * POSTs a message as JSON, and once more if no connection is made, or one breaks before an answer. With a secret the request is signed.
 *
 * @param id the same for each attempt to deliver the same message
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
    return postOnce(url, { 'content-type': 'application/json', ...signature }, body, deadline)
  }
  const first = await post()
  // A receiver that did not speak HTTP may have the message already.
  const isRepeated = !first.mayBeReceived || brokenConnections.has(first.code)
  if (first.status !== undefined || first.code === timeoutCode || !isRepeated) return first
  const second = await post()
  return { ...second, mayBeReceived: first.mayBeReceived || second.mayBeReceived }
}

function postOnce(
  url: string,
  headers: http.OutgoingHttpHeaders,
  body: string,
  deadline: number
): Promise<WebhookResult & { code: string }> {
  const { request: open } = new URL(url).protocol === 'https:' ? https : http
  return new Promise((resolve) => {
    const request = open(url, { method: 'POST', headers, ...addressTimeout })
    let wasWritten = false
    let isLate = false
    // An AbortSignal takes as long as the rest of the request.
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
      resolve({ status, isAccepted, mayBeReceived: false, outcome: `answered ${status}`, code: '' })
      // Only the status counts. The body is read so that the connection can be reused.
      let bytes = 0
      response.on('error', () => undefined)
      response.on('data', (chunk: Buffer) => {
        bytes += chunk.length
        if (bytes > answerMaxBytes) response.destroy()
      })
    })
    function fail(error?: unknown): void {
      const code = isLate ? timeoutCode : codeOf(error)
      const outcome = `did not answer: ${code}`
      resolve({ status: undefined, isAccepted: false, mayBeReceived: wasWritten, outcome, code })
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
