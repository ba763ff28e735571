import { client, type Reply } from '../../testkit/client.js'
import type { Attempt, Ending } from './requests.js'
import type { ClientSpec, ScenarioEvent } from './scenarios.js'
import type { System } from './system.js'

/** The codes that clients present. */
export const codes: Record<ClientSpec['presents'], string> = {
  'the code': '123456',
  'the new code': '654321',
  'a wrong code': '111111'
}

export const codeKey = (mobile: string) => `sms_code_${mobile}`

/** A client of one run, and its requests so far. */
export interface Client extends ClientSpec {
  sent: Attempt[]
}

export interface Answer {
  kind: 'answer'
  client: Client
  attempt: Attempt
  reply: Reply
}

/** A round trip that a store has run. */
export interface RoundTrip {
  kind: 'round trip'
  client: Client
  attempt: Attempt
  name: string
  ending: Ending
}

export type Entry =
  | { kind: 'arrival'; client: Client; attempt: Attempt }
  | RoundTrip
  | Answer
  | { kind: 'event'; event: ScenarioEvent | 'the issued code is withdrawn' }
  | { kind: 'all leases have passed' }

/** What has happened in one run. */
export interface History {
  mobile: string
  /** Whether the mobile had a user before. */
  wasRegistered: boolean
  clients: readonly Client[]
  /** Each choice and each answer in a line. */
  log: string[]
  /** What has happened, in this order. */
  entries: Entry[]
  /** How many wrong codes a guesser has. */
  guesses: number
}

/** Sends the request of a client. */
export function send({ app }: System, { mobile }: History, sender: ClientSpec): Promise<Reply> {
  const { action, presents, password, address } = sender
  const api = client(app)
  const body = { mobile, sms_code: codes[presents], password, password2: password }
  const options = { from: address }
  return action === 'sign up' ? api.signUp(body, options) : api.resetPassword(body, options)
}

export function hasHappened({ entries }: History, ...events: ScenarioEvent[]): boolean {
  return entries.some((entry) => entry.kind === 'event' && events.some((event) => event === entry.event))
}

/** Whether the guesser of a client has no wrong codes left. Only the entries before the index `before` count. */
export function isSpent({ entries, guesses }: History, { address }: ClientSpec, before = entries.length): boolean {
  let wrong = 0
  for (const entry of entries.slice(0, before)) {
    if (entry.kind !== 'round trip') continue
    const { client, name } = entry
    // A success resets the wrong codes.
    if (name === 'completeClaim') wrong = 0
    if (name === 'claimCode' && client.presents === 'a wrong code' && client.address === address) wrong++
  }
  return wrong >= guesses
}

/**
 * Whether two wrong passwords have ended the replays of the code: a replay whose password is not that of the row, or a request
 * that has conceded its claim. A success after them allows replays again.
 */
export function areReplaysOver({ entries, wasRegistered }: History): boolean {
  let wrong = 0
  let written: string | undefined = wasRegistered ? 'the former password' : undefined
  const isWrong = new Map<Attempt, boolean>()
  for (const entry of entries) {
    if (entry.kind !== 'round trip') continue
    const { client, attempt, name, ending } = entry
    if (name === 'insert_user') written ??= client.password
    if (name === 'set_password' && written !== undefined) written = client.password
    // Without the answer of Postgres the replay ends without a wrong password.
    if (name === 'find_user') isWrong.set(attempt, ending === 'done' && written !== client.password)
    if (name === 'endReplay' && isWrong.get(attempt)) wrong++
    if (name === 'concedeClaim') wrong = Math.max(wrong, 1)
    if (name === 'completeClaim') wrong = 0
  }
  return wrong >= 2
}
