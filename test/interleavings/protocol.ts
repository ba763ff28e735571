import { type Attempt, type Client, codes, type Entry, type History, requestOf } from './history.js'

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

  private readonly guesses: number

  /** @param count only the first entries count, by default all */
  constructor({ entries, guesses }: History, count?: number) {
    this.guesses = guesses
    for (const entry of entries.slice(0, count)) this.apply(entry)
  }

  /** What a request of the client is told if it presents its code now. */
  answerTo(client: Client): 'spent' | 'wrong' | 'in progress' | 'held' {
    if ((this.wrongCodes.get(client.address) ?? 0) >= this.guesses) return 'spent'
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
