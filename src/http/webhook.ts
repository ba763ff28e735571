import { createHmac } from 'node:crypto'
import http from 'node:http'
import https from 'node:https'
import { TLSSocket } from 'node:tls'

/** The time for both attempts together. Events rely on it: less than the 6 s until their next delivery (events/delivery.ts). */
const timeoutMs = 5_000

/** If the receiver has several addresses, each but the last has this time to connect. Node's 250 ms are too short for a distant one. */
const addressTimeout = { autoSelectFamilyAttemptTimeout: 1_500 }

/** The error codes of a connection that broke before an answer. */
const brokenConnections: ReadonlySet<string> = new Set(['ECONNRESET', 'EPIPE', 'ETIMEDOUT'])

/** How much of an answer is read, and for how long, so that its connection can be reused. Otherwise it is closed. */
const answerMaxBytes = 65_536
const bodyTimeoutMs = 100

/** What became of a message. */
export interface WebhookResult {
  /** Of the answer. Undefined: there was none. */
  status: number | undefined
  /** Whether the status is 2xx. */
  isAccepted: boolean
  /** Whether the receiver may have got the message in an attempt that has no answer. */
  mayHaveArrived: boolean
  /** For the log: `answered 500`, or `did not answer: ECONNRESET`. The code is `timeout`, or from the system, TLS or the HTTP parser. */
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
  const target = new URL(url)
  const client = target.protocol === 'https:' ? https : http
  const body = JSON.stringify(message)
  const deadline = performance.now() + timeoutMs
  const post = () => {
    const signature = secret === undefined ? { 'webhook-id': id } : signatureHeaders(secret, id, body)
    const headers = { 'content-type': 'application/json', ...signature }
    return postOnce(client.request(target, { method: 'POST', headers, ...addressTimeout }), body, deadline)
  }
  const { mayRepeat, result } = await post()
  if (!mayRepeat) return result
  // What broke one idle connection may have broken all.
  for (const socket of Object.values(client.globalAgent.freeSockets).flat()) socket?.destroy()
  const { result: second } = await post()
  return { ...second, mayHaveArrived: result.mayHaveArrived || second.mayHaveArrived }
}

/** Resolves when the connection is free or closed. So there are never more connections than unfinished messages. */
function postOnce(
  request: http.ClientRequest,
  body: string,
  deadline: number
): Promise<{ result: WebhookResult; mayRepeat: boolean }> {
  return new Promise((resolve) => {
    let wasWritten = false
    let isLate = false
    let answer: WebhookResult | undefined
    let failure: unknown
    // Not AbortSignal.timeout(), which took half of the CPU time of a request.
    let timer = setTimeout(() => {
      isLate = true
      request.destroy()
    }, deadline - performance.now())
    function write(): void {
      wasWritten = true
      request.end(body)
    }
    request.once('socket', (socket) => {
      // Without a route it has failed already.
      if (socket.destroyed) return
      // The body is written only when the certificate is verified. So `wasWritten` tells whether anybody can have read it.
      // A reused connection, and one through an outgoing proxy, is open already.
      const isTls = socket instanceof TLSSocket
      if (isTls ? socket.getPeerFinished() !== undefined : !socket.connecting) write()
      else socket.once(isTls ? 'secureConnect' : 'connect', write)
    })
    request.once('response', (response) => {
      const { statusCode: status = 0 } = response
      const isAccepted = status >= 200 && status < 300
      answer = { status, isAccepted, mayHaveArrived: false, summary: `answered ${status}` }
      clearTimeout(timer)
      timer = setTimeout(() => request.destroy(), bodyTimeoutMs)
      let bytes = 0
      response.on('error', () => undefined)
      response.on('data', (chunk: Buffer) => {
        bytes += chunk.length
        if (bytes > answerMaxBytes) response.destroy()
      })
    })
    request.on('error', (error) => {
      failure ??= error
    })
    request.once('close', () => {
      clearTimeout(timer)
      if (answer) return resolve({ result: answer, mayRepeat: false })
      const code = isLate ? 'timeout' : codeOf(failure)
      const summary = `did not answer: ${code}`
      // After a timeout no time is left. After an answer that is not HTTP, the receiver may have the message.
      const mayRepeat = !isLate && (!wasWritten || brokenConnections.has(code))
      resolve({ result: { status: undefined, isAccepted: false, mayHaveArrived: wasWritten, summary }, mayRepeat })
    })
  })
}

const codeOf = (error: unknown): string => (error instanceof Error && 'code' in error ? `${error.code}` : 'unknown')

/**
 * Returns the headers of Standard Webhooks (https://www.standardwebhooks.com). A receiver verifies with them that a message comes
 * from this service. Libraries in many languages do that.
 *
 * @param secret `whsec_` and the key in base64, or any other text, whose bytes are the key
 */
export function signatureHeaders(secret: string, id: string, body: string) {
  const key = secret.startsWith('whsec_') ? Buffer.from(secret.slice('whsec_'.length), 'base64') : secret
  const seconds = Math.floor(Date.now() / 1_000)
  const mac = createHmac('sha256', key).update(`${id}.${seconds}.${body}`).digest('base64')
  return { 'webhook-id': id, 'webhook-timestamp': `${seconds}`, 'webhook-signature': `v1,${mac}` }
}
