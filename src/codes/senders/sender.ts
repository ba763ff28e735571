/** A code for a person. */
export interface SmsMessage {
  mobile: string
  code: string
  ttlSeconds: number
  /** The same for each attempt to send this message, so that a receiver can drop duplicates. */
  id: string
}

/** Hands a message to a gateway. Resolves when the gateway has accepted it. */
export type SmsSender = (message: SmsMessage) => Promise<void>

/** The gateway works but refuses this message, for example because the number does not exist. */
export class MessageRefused extends Error {
  override readonly name = 'MessageRefused'
}
