import { createHmac } from 'node:crypto'
import type { SmsSender } from './sender.js'

/** How long the receiver may take, both tries together. */
const timeoutMs = 5_000

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
    const answer = await post().catch((error) => {
      // There was no connection, or it broke. A receiver that was too slow is not asked twice.
      if (signal.aborted) throw error
      return post()
    })
    await drain(answer)
    if (!answer.ok) throw new Error(`the SMS webhook answered ${answer.status}`)
  }
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
