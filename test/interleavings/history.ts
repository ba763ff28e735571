import type { Reply } from '../../testkit/client.js'
import type { Step } from './requests.js'
import type { ClientSpec } from './scenarios.js'

/** The codes that clients present. */
export const codes = { 'the code': '123456', 'the new code': '654321', 'a wrong code': '111111' } as const

/** A client of one run, and its requests so far. */
export interface Client extends ClientSpec {
  sent: Attempt[]
}

/** One request, from its arrival to its reply, or to the death of its process. */
export interface Attempt {
  readonly client: Client
  /** What goes wrong in it. */
  readonly fault: ClientSpec['firstAttempt']
  /** What it has sent, and waits for, in this order. */
  steps: readonly Step[]
  reply?: Reply
  isDead: boolean
}

/** Requests that are the same have one success. */
export const requestOf = ({ action, password }: Client) => `${action} with ${password}`

export type Entry =
  | { kind: 'arrival'; attempt: Attempt }
  /** A store has run it. */
  | { kind: 'round trip'; attempt: Attempt; name: string }
  /** From now on this code, or none, lies under `sms_code_<mobile>`. */
  | { kind: 'code'; code: string | undefined }
  | { kind: 'the lease passes' }

/** What has happened in one run. */
export interface History {
  mobile: string
  clients: readonly Client[]
  /** How many wrong codes a guesser has. */
  guesses: number
  entries: Entry[]
}
