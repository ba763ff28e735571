/*
 * Receives the messages of mobile-signup (SMS_WEBHOOK_URL) and hands each of them to an SMS provider.
 *
 * Answers 204 when the provider has accepted the message, 422 when it refuses this message, 502 when it fails.
 * A request that is not from mobile-signup gets 400, 401, 405 or 413.
 * After a 4xx mobile-signup knows that no message was sent. After a 5xx the message may have been delivered.
 */
import { createServer, type IncomingHttpHeaders, type IncomingMessage, type Server } from 'node:http'
import { Webhook } from 'standardwebhooks'

/** A code for a person. */
export interface SmsMessage {
  mobile: string
  code: string
  ttlSeconds: number
  /** The same in every request for this message. */
  id: string
  /** `sign_up`, `password`, `log_in` or `delete`, for the text of the message. Undefined: the code is for everything. */
  purpose: string | undefined
  language: 'zh' | 'en'
}

/** The provider works but refuses this message, for example because the number does not exist. */
export class MessageRefused extends Error {
  override readonly name = 'MessageRefused'
}

export interface WebhookOptions {
  /** The value of SMS_WEBHOOK_SECRET. */
  secret: string
  /**
   * Resolves when the provider has accepted the message. Mobile-signup waits 5 s for the answer.
   *
   * @throws {MessageRefused} if the provider refuses this message; any other error counts as a failure of the provider
   */
  sendSms(message: SmsMessage): Promise<void>
}

/** A signature may be 5 minutes ahead of the clock, and is accepted until 5 minutes after its time. */
const idLifeMs = 600_000

const bodyMaxBytes = 4_096

const requestTimeoutMs = 10_000

interface Delivery {
  status: Promise<number>
  expiresAt: number
}

/** Creates the receiver. Call `listen()` on it. It keeps the ids in memory, so run one process of it. */
export function createWebhook({ secret, sendSms }: WebhookOptions): Server {
  /** The deliveries by message id, the oldest first. */
  const deliveries = new Map<string, Delivery>()

  async function statusFor(request: IncomingMessage): Promise<number> {
    if (request.method !== 'POST') return 405
    const body = await readBody(request)
    if (body === undefined) return 413
    const payload = verified(secret, body, request.headers)
    if (payload === undefined) return 401
    const message = parseMessage(payload)
    return message === undefined ? 400 : deliverOnce(message)
  }

  /** Mobile-signup repeats a request if the connection fails. The person must not get two messages. */
  function deliverOnce(message: SmsMessage): Promise<number> {
    forgetExpired()
    const earlier = deliveries.get(message.id)
    if (earlier !== undefined) return earlier.status
    const status = deliver(message)
    deliveries.set(message.id, { status, expiresAt: Date.now() + idLifeMs })
    return status
  }

  async function deliver(message: SmsMessage): Promise<number> {
    try {
      await sendSms(message)
      return 204
    } catch (error) {
      // Mobile-signup takes a 4xx for a refused number, and a 5xx for a failing gateway: it stops sending after several.
      return error instanceof MessageRefused ? 422 : 502
    }
  }

  function forgetExpired(): void {
    for (const [id, { expiresAt }] of deliveries) {
      if (expiresAt > Date.now()) return
      deliveries.delete(id)
    }
  }

  return createServer({ requestTimeout: requestTimeoutMs }, (request, response) => {
    statusFor(request).then(
      (status) => response.writeHead(status).end(),
      // The client disconnected before the body was complete.
      () => response.destroy()
    )
  })
}

/** Returns the body, or undefined if it is too large. */
async function readBody(request: IncomingMessage): Promise<Buffer | undefined> {
  const chunks: Buffer[] = []
  let bytes = 0
  for await (const chunk of request) {
    bytes += chunk.length
    if (bytes <= bodyMaxBytes) chunks.push(chunk)
  }
  return bytes <= bodyMaxBytes ? Buffer.concat(chunks) : undefined
}

/** Returns what was signed (Standard Webhooks), or undefined if the request is not from mobile-signup, or older than five minutes. */
function verified(secret: string, body: Buffer, headers: IncomingHttpHeaders): unknown {
  try {
    const webhook = secret.startsWith('whsec_') ? new Webhook(secret) : new Webhook(secret, { format: 'raw' })
    const [id, timestamp, signature] = [
      headers['webhook-id'],
      headers['webhook-timestamp'],
      headers['webhook-signature']
    ]
    return webhook.verify(body.toString(), {
      'webhook-id': `${id}`,
      'webhook-timestamp': `${timestamp}`,
      'webhook-signature': `${signature}`
    })
  } catch {
    return undefined
  }
}

/** Returns a message, or undefined if the value is none. */
function parseMessage(value: unknown): SmsMessage | undefined {
  if (typeof value !== 'object' || value === null) return undefined
  if (!('mobile' in value && 'code' in value && 'ttl_s' in value && 'id' in value)) return undefined
  const { mobile, code, ttl_s, id } = value
  if (typeof mobile !== 'string' || typeof code !== 'string' || typeof id !== 'string') return undefined
  if (typeof ttl_s !== 'number') return undefined
  const purpose = 'purpose' in value && typeof value.purpose === 'string' ? value.purpose : undefined
  const language = 'language' in value && value.language === 'en' ? 'en' : 'zh'
  return { mobile, code, ttlSeconds: ttl_s, id, purpose, language }
}
