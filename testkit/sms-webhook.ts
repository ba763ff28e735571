import { createServer, type IncomingMessage, type ServerResponse } from 'node:http'
import { text } from 'node:stream/consumers'
import type { Test } from 'tap'
import { listen } from './listen.js'

/** A message as the webhook receives it. */
export interface ReceivedMessage {
  mobile: string
  code: string
  ttl_s: number
  id: string
  purpose: string | null
  language: string
  signature: string | string[] | undefined
  /** The bytes that are signed. */
  body: string
}

export type Answer = (request: IncomingMessage, response: ServerResponse, message: ReceivedMessage) => void

export const accept: Answer = (_request, response) => response.end('{}')

/** Answers with a status and no body. */
export const answerWith =
  (status: number): Answer =>
  (_request, response) =>
    response.writeHead(status).end()

/**
 * Starts an SMS gateway on loopback that records its messages. It accepts them until a test replaces `answer`, or sets that of a
 * mobile in `answers`.
 */
export async function startWebhook(t: Test) {
  const webhook = { received: [] as ReceivedMessage[], url: '', answer: accept, answers: new Map<string, Answer>() }
  const server = createServer(async (request, response) => {
    const body = await text(request)
    const message: ReceivedMessage = { ...JSON.parse(body), body, signature: request.headers['webhook-signature'] }
    webhook.received.push(message)
    const answer = webhook.answers.get(message.mobile) ?? webhook.answer
    answer(request, response, message)
  })
  webhook.url = `${await listen(t, server)}/sms`
  return webhook
}

/** No limits on messages unless a test sets one, and store timeouts that are long enough for a busy machine. */
export const unlimitedSms = {
  SMS_RESEND_S: '0',
  SMS_DAILY_MAX: '0',
  SMS_IP_HOURLY_MAX: '0',
  SMS_PREFIX_HOURLY_MAX: '0',
  SMS_HOURLY_MAX: '0',
  STORE_TIMEOUT_MS: '20000'
}
