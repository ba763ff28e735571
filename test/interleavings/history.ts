import { client, type Reply } from '../../testkit/client.js'
import type { Attempt } from './requests.js'
import type { ClientSpec } from './scenarios.js'
import type { System } from './system.js'

export const code = '123456'
export const newCode = '654321'
const wrongCode = '111111'

export const codeKey = (mobile: string) => `sms_code_${mobile}`

/** A client of one run, and its requests so far. */
export interface Client extends ClientSpec {
  sent: Attempt[]
}

/** What has happened in one run. */
export interface History {
  mobile: string
  clients: readonly Client[]
  /** Each step in a line. */
  log: string[]
  /** For each claim that Redis has run, its client, in order. */
  claims: Client[]
  /** Whether the code has expired or was replaced. */
  isCodeGone: boolean
  /** How many wrong codes a guesser has. */
  guesses: number
}

/** Sends the request of a client. */
export function send({ app }: System, { mobile }: History, sender: ClientSpec): Promise<Reply> {
  const { action, hasCode, password, address } = sender
  const api = client(app)
  const body = { mobile, sms_code: hasCode ? code : wrongCode, password, password2: password }
  const options = { from: address }
  return action === 'sign up' ? api.signUp(body, options) : api.resetPassword(body, options)
}

/** Whether the guesser of a client has spent its wrong codes, among the claims before one of its own. */
export function isSpent({ claims, guesses }: History, { address }: ClientSpec, before = claims.length): boolean {
  const wrong = claims.slice(0, before).filter((claimer) => !claimer.hasCode && claimer.address === address)
  return wrong.length >= guesses
}
