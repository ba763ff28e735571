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

interface Claim {
  code: string
  action: Client['action']
  /** The last request that held the code, until it releases the code. */
  holder: Attempt | undefined
  isLeaseOver: boolean
  /** The request that used the code. */
  usedFor?: string
  wrongPasswords: number
}

/**
 * What a client may expect of its code. A code lies in Redis until a request presents it. From then on the same request can
 * repeat it, until another code of the mobile is presented, or two requests with it had a wrong password.
 */
export class Protocol {
  /** The code that lies under `sms_code_<mobile>`. */
  lying: string | undefined
  private claim: Claim | undefined
  /** The number of wrong codes of each address. */
  private readonly wrongCodes = new Map<string, number>()

  /** @param count only the first entries count, by default all */
  constructor(
    private readonly history: History,
    count?: number
  ) {
    for (const entry of history.entries.slice(0, count)) this.apply(entry)
  }

  /** What a request of the client is told if it presents its code now. */
  answerTo(client: Client): 'spent' | 'wrong' | 'in progress' | 'held' {
    if ((this.wrongCodes.get(client.address) ?? 0) >= this.history.guesses) return 'spent'
    if (codes[client.presents] === this.lying) return 'held'
    if (this.claimOf(client) === undefined) return 'wrong'
    return this.isHeld ? 'in progress' : 'held'
  }

  get isHeld(): boolean {
    return this.claim?.holder !== undefined && !this.claim.isLeaseOver
  }

  /** Returns the request that has used the code of a client. */
  usedFor(client: Client): string | undefined {
    return codes[client.presents] === this.lying ? undefined : this.claimOf(client)?.usedFor
  }

  private claimOf({ presents, action }: Client): Claim | undefined {
    return this.claim?.code === codes[presents] && this.claim.action === action ? this.claim : undefined
  }

  private apply(entry: Entry): void {
    if (entry.kind === 'code') this.lying = entry.code
    if (entry.kind === 'the lease passes' && this.claim) this.claim.isLeaseOver = true
    if (entry.kind !== 'round trip') return
    if (entry.name === 'holdCode') this.hold(entry.attempt)
    if (entry.name.startsWith('release ')) this.release(entry.attempt, entry.name)
  }

  private hold(holder: Attempt): void {
    const { presents, action, address } = holder.client
    const answer = this.answerTo(holder.client)
    // The right code for another purpose costs nothing.
    if (answer === 'wrong' && codes[presents] !== this.claim?.code) {
      this.wrongCodes.set(address, (this.wrongCodes.get(address) ?? 0) + 1)
    }
    if (answer !== 'held') return
    const isFirst = codes[presents] === this.lying
    const former = isFirst ? undefined : this.claim
    if (isFirst) this.lying = undefined
    this.claim = { code: codes[presents], action, wrongPasswords: 0, ...former, holder, isLeaseOver: false }
  }

  private release(attempt: Attempt, name: string): void {
    const { claim } = this
    if (claim?.holder !== attempt) return
    claim.holder = undefined
    if (name.startsWith('release used')) claim.usedFor = requestOf(attempt.client)
    if (name === 'release used') this.wrongCodes.clear()
    if (name === 'release wrong_password' && ++claim.wrongPasswords === 2) this.claim = undefined
  }
}
