import type { Language } from '../../outcomes.js'
import type { CodePurpose } from '../codes.js'

/** A code for a person. */
export interface SmsMessage {
  mobile: string
  code: string
  ttlSeconds: number
  /** For the text of the message. Undefined: the code is for everything. */
  purpose: CodePurpose | undefined
  /** Of the client. */
  language: Language
  /** The same for each attempt to send this message, so that a receiver can drop duplicates. */
  id: string
}

/**
 * Hands a message to a gateway. Resolves when the gateway has accepted it.
 *
 * @throws {MessageNotSent} if the message was certainly not sent; after any other error it may have been
 */
export type SmsSender = (message: SmsMessage) => Promise<void>

/** The message was certainly not sent. */
export class MessageNotSent extends Error {
  override readonly name: string = 'MessageNotSent'
}

/** The gateway works but refuses this message, for example because the number does not exist. */
export class MessageRefused extends MessageNotSent {
  override readonly name = 'MessageRefused'
}
