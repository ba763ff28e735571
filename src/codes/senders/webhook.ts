import { postWebhook } from '../../http/webhook.js'
import { MessageNotSent, MessageRefused, type SmsSender } from './sender.js'

/** POSTs each message as `{mobile, code, ttl_s, id, purpose, language}`; `purpose` is null if the code is for everything. */
export function webhookSender(url: string, secret: string | undefined): SmsSender {
  return async ({ mobile, code, ttlSeconds, id, purpose = null, language }) => {
    const message = { mobile, code, ttl_s: ttlSeconds, id, purpose, language }
    const { status, isAccepted, mayHaveArrived, summary } = await postWebhook(url, secret, id, message)
    if (isAccepted) return
    const reason = `the SMS webhook ${summary}`
    if (mayHaveArrived) throw new Error(reason)
    if (status === undefined) throw new MessageNotSent(reason)
    throw status >= 400 && status < 500 ? new MessageRefused(reason) : new Error(reason)
  }
}
