/** A code on its way to a person. */
export interface SmsMessage {
  mobile: string
  code: string
  ttlSeconds: number
  /** The same for each try to send this message, so that a receiver can drop a duplicate. */
  id: string
}

/** Hands a message on. Resolves when it was accepted, rejects otherwise: then the person is told to ask again. */
export type SmsSender = (message: SmsMessage) => Promise<void>

/** The gateway works, but will not send this message: as for a number that does not exist. */
export class MessageRefused extends Error {
  override readonly name = 'MessageRefused'
}
