import http from 'node:http'
import https from 'node:https'
import { TLSSocket } from 'node:tls'
import { signatureHeaders } from '../../http/webhook-signature.js'
import { MessageNotSent, MessageRefused, type SmsSender } from './sender.js'

/** The time for both attempts together. */
const timeoutMs = 5_000

/** Each address of the webhook but the last has this time to connect. Node's 250 ms are short for one that is far away. */
const addressTimeout = { autoSelectFamilyAttemptTimeout: timeoutMs / 2 }

/** Codes for a connection that broke before an answer. The message may have been sent. */
const brokenConnections: ReadonlySet<string> = new Set(['ECONNRESET', 'EPIPE', 'ETIMEDOUT'])

/** How much of an answer is read, so that its connection can be reused. */
const answerMaxBytes = 65_536

/**
 * POSTs each message as JSON, `{mobile, code, ttl_s, id, purpose, language}`; `purpose` is null if the code is for everything. With a
 * secret the request is signed.
 */
export function webhookSender(url: string, secret: string | undefined): SmsSender {
  return async ({ mobile, code, ttlSeconds, id, purpose = null, language }) => {
    const body = JSON.stringify({ mobile, code, ttl_s: ttlSeconds, id, purpose, language })
    const signal = AbortSignal.timeout(timeoutMs)
    const post = () => {
      const signature = secret === undefined ? undefined : signatureHeaders(secret, id, body)
      return postOnce(url, { 'content-type': 'application/json', ...signature }, body, signal)
    }
    let mayBeSent = false
    const status = await post()
      .catch((error) => {
        mayBeSent = !(error instanceof MessageNotSent)
        // A receiver that was too slow, or did not speak HTTP, may have sent the message already.
        if (signal.aborted || (mayBeSent && !brokenConnections.has(codeOf(error.cause)))) throw error
        return post()
      })
      .catch((error) => {
        throw mayBeSent ? new Error(error.message) : error
      })
    if (status >= 200 && status < 300) return
    const message = `the SMS webhook answered ${status}`
    const isRefusal = status >= 400 && status < 500 && !mayBeSent
    throw isRefusal ? new MessageRefused(message) : new Error(message)
  }
}

/**
 * Sends a request, and returns the status of its answer.
 *
 * @throws {MessageNotSent} if nothing of it was written: its name was not found, no connection was made, or TLS failed
 */
function postOnce(url: string, headers: http.OutgoingHttpHeaders, body: string, signal: AbortSignal): Promise<number> {
  const { request: open } = new URL(url).protocol === 'https:' ? https : http
  return new Promise((resolve, reject) => {
    const request = open(url, { method: 'POST', headers, signal, ...addressTimeout })
    let wasWritten = false
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
      resolve(response.statusCode ?? 0)
      // Only the status counts. The body is read so that the connection can be reused.
      let bytes = 0
      response.on('error', () => undefined)
      response.on('data', (chunk: Buffer) => {
        bytes += chunk.length
        if (bytes > answerMaxBytes) response.destroy()
      })
    })
    function fail(cause?: unknown): void {
      const message = `the SMS webhook did not answer: ${signal.aborted ? 'timeout' : codeOf(cause)}`
      reject(wasWritten ? new Error(message, { cause }) : new MessageNotSent(message))
    }
    request.on('error', fail)
    request.once('close', fail)
  })
}

/** Returns why a request failed: a code of the system, of TLS or of the HTTP parser. */
const codeOf = (error: unknown): string => (error instanceof Error && 'code' in error ? `${error.code}` : 'unknown')
