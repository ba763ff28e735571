import { postWebhook } from '../../http/webhook.js'
import { MessageNotSent, MessageRefused, type SmsSender } from './sender.js'

/** POSTs each message as `{mobile, code, ttl_s, id, purpose, language}`; `purpose` is null if the code is for everything. */
export function webhookSender(url: string, secret: string | undefined): SmsSender {
  return async ({ mobile, code, ttlSeconds, id, purpose = null, language }) => {
    const message = { mobile, code, ttl_s: ttlSeconds, id, purpose, language }
    const { status, isAccepted, mayBeReceived, outcome } = await postWebhook(url, secret, id, message)
    if (isAccepted) return
    const cause = `the SMS webhook ${outcome}`
    if (mayBeReceived) throw new Error(cause)
    if (status === undefined) throw new MessageNotSent(cause)
    throw status >= 400 && status < 500 ? new MessageRefused(cause) : new Error(cause)
  }
}
