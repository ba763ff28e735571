import { createHmac } from 'node:crypto'

/**
 * Returns the headers by which a receiver verifies that a webhook is from this service, as Standard Webhooks says
 * (https://www.standardwebhooks.com). Libraries in many languages verify them.
 *
 * @param secret `whsec_<base64>`, or any other text, whose bytes are the key
 * @param id the same for each attempt to deliver the same message
 */
export function signatureHeaders(secret: string, id: string, body: string) {
  const key = secret.startsWith('whsec_') ? Buffer.from(secret.slice('whsec_'.length), 'base64') : secret
  const seconds = Math.floor(Date.now() / 1_000)
  const mac = createHmac('sha256', key).update(`${id}.${seconds}.${body}`).digest('base64')
  return { 'webhook-id': id, 'webhook-timestamp': `${seconds}`, 'webhook-signature': `v1,${mac}` }
}
