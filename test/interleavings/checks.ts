import { verify } from '@node-rs/argon2'
import type { Reply } from '../../testkit/client.js'
import { sessionKeyOf } from '../../testkit/testbed.js'
import {
  type Answer,
  areReplaysOver,
  type Client,
  codeKey,
  codes,
  type History,
  hasHappened,
  isSpent
} from './history.js'
import type { Attempt } from './requests.js'
import type { System } from './system.js'

interface Row {
  id: string
  phc: string
}

/** Whether a request has an answer that no retry changes. */
const isRefused = ({ reply }: Attempt) => reply !== undefined && reply.statusCode >= 400 && reply.statusCode < 500

const isSuccess = ({ reply }: { reply: Reply }) => reply.json().errno === '0'

/** Requests that are the same have one success. */
const requestOf = ({ action, password }: Client) => `${action} with ${password}`

/** The statements that read or write the row of a user. Each success has run one of them. */
const rowStatements = ['insert_user', 'find_user', 'set_password']

/** Compares a run with the guarantees of docs/guarantees.md. */
export class Checks {
  readonly violations: string[] = []

  constructor(
    private readonly system: System,
    private readonly history: History
  ) {}

  /**
   * After the completion of a success its code does not work again. If Redis has not run the completion, another request can
   * claim the code after the lease, and put it back. To be called when no request is running.
   */
  async checkUsedCodes(): Promise<void> {
    const stored = await this.readCode()
    const back = this.successes().find(
      (success) => codes[success.client.presents] === stored && this.completionOf(success) !== -1
    )
    if (back) this.violations.push(`G1: ${back.client.presents} works again after the success of ${back.client.name}`)
  }

  /**
   * Sends a request once more, and checks whether it must succeed. All leases have passed.
   *
   * @param retry runs the request without a fault
   */
  async checkRetry(client: Client, retry: () => Promise<void>): Promise<void> {
    const { violations, history } = this
    const row = await this.readRow()
    const written = row && (await findPassword(row.phc, history.clients))
    const isTaken = this.isDiscarded(client.presents) || this.isHeldForOther(client) || this.isReplaced(client)
    const mustBeKept = !isTaken && this.hasPossibleSuccess(client, row)
    const mustBeRepeated = !areReplaysOver(history) && !this.isRecordReplaced(client)
    const isClaimed = this.isClaimedLate()
    const isGuesserSpent = isSpent(history, client)
    await retry()
    const answer = this.answers().at(-1)
    if (answer?.client !== client) throw new Error(`the retry of ${client.name} has no answer`)
    const { statusCode } = answer.reply
    // {@link checkEnd} verifies that a spent guesser has no success.
    if (isSuccess(answer) || isGuesserSpent || (isClaimed && statusCode === 503)) return
    if (statusCode >= 500) violations.push(`G4: ${client.name} is answered ${statusCode} after the lease`)
    else if (written === undefined && mustBeKept) violations.push(`G4: ${client.name} has lost its code`)
    else if (written === client.password && mustBeRepeated) violations.push(`G5: the retry of ${client.name} fails`)
  }

  async checkEnd(): Promise<void> {
    if (!this.history.entries.some((entry) => entry.kind === 'round trip' && entry.name === 'claimCode')) {
      throw new Error('no request has claimed a code, so nothing has been checked')
    }
    await this.checkUsedCodes()
    await this.checkNewCode()
    this.checkSingleUse()
    this.checkGuesses()
    const row = await this.readRow()
    for (const success of this.successes()) await this.checkRow(success, row)
  }

  private async checkNewCode(): Promise<void> {
    if (!hasHappened(this.history, 'a new code is sent')) return
    const isUsed = this.successes().some(({ client }) => client.presents === 'the new code')
    const isStored = (await this.readCode()) === codes['the new code']
    if (!isStored && !isUsed && !this.isDiscarded('the new code')) this.violations.push('G4: the new code is lost')
  }

  /**
   * Two sign-ups never succeed with different passwords. When Redis has run the completion of a success, no other request that
   * arrives later succeeds with the same code. Without the completion, another reset can claim the code after the lease.
   */
  private checkSingleUse(): void {
    const { entries } = this.history
    for (const first of this.successes()) {
      const completion = this.completionOf(first)
      for (const second of this.successes()) {
        if (requestOf(first.client) === requestOf(second.client)) continue
        const areSignUps = first.client.action === 'sign up' && second.client.action === 'sign up'
        const hasSameCode = first.client.presents === second.client.presents
        const sent = entries.findIndex(
          (entry) => entry.kind === 'arrival' && requestOf(entry.client) === requestOf(second.client)
        )
        if (areSignUps || (hasSameCode && completion !== -1 && sent > completion)) {
          this.violations.push(`G1: after the success of ${first.client.name}, ${second.client.name} succeeds, too`)
          return
        }
      }
    }
  }

  /** Returns the index of the round trip that completed a success, or -1 if Redis has run none. A replay has none. */
  private completionOf({ attempt }: Answer): number {
    return this.indexOf('completeClaim', attempt)
  }

  /** Returns the index of the first round trip of a request with this name among all entries, or -1. */
  private indexOf(name: string, attempt: Attempt): number {
    return this.history.entries.findIndex(
      (entry) => entry.kind === 'round trip' && entry.name === name && entry.attempt === attempt
    )
  }

  private checkGuesses(): void {
    for (const { client, attempt } of this.successes()) {
      const claim = this.indexOf('claimCode', attempt)
      if (claim === -1) this.violations.push(`G8: ${client.name} succeeds without a claim`)
      else if (isSpent(this.history, client, claim)) {
        this.violations.push(`G8: ${client.name} succeeds, although its guesses are spent`)
      }
      if (client.presents === 'a wrong code') this.violations.push(`G8: ${client.name} had a wrong code and succeeds`)
    }
  }

  /** The row of a success lasts. A later reset replaces its password, and ends its session. */
  private async checkRow({ client, attempt, reply }: Answer, row: Row | undefined): Promise<void> {
    const { violations } = this
    const { name, password } = client
    const roundTrips = this.roundTrips()
    const proof = roundTrips.findLastIndex((step) => step.attempt === attempt && rowStatements.includes(step.name))
    const resets = roundTrips.slice(proof + 1).filter((step) => step.name === 'set_password')
    const { user_id: userId, session } = reply.json().data
    if (proof === -1) violations.push(`G3: ${name} succeeds without its row`)
    if (row?.id !== userId) violations.push(`G3: ${name} got user ${userId}, but the row has ${row?.id}`)
    else if (!(await verify(row.phc, resets.at(-1)?.client.password ?? password))) {
      violations.push(`G3: the row does not have the password of ${resets.at(-1)?.client.name ?? name}`)
    }
    const isLive = await this.hasSession(reply, userId)
    if (session && resets.length === 0 && !isLive) violations.push(`G3: ${name} has no session`)
    const isReset = resets.some((reset) => this.successes().some((success) => success.attempt === reset.attempt))
    if (isReset && isLive) violations.push(`G9: the session of ${name} lives after a later reset`)
  }

  /** Whether a request can succeed: a sign-up needs a mobile without a user, a reset a mobile with one. */
  private hasPossibleSuccess({ action }: Client, row: Row | undefined): boolean {
    return (action === 'sign up') === (row === undefined)
  }

  /** Whether the code of a client has expired or was replaced. */
  private isReplaced({ presents }: Client): boolean {
    return presents === 'the code' && hasHappened(this.history, 'the code expires', 'a new code is sent')
  }

  /** Whether a request was refused for good, because of the row. That uses the code up, even if Redis does not hear of it. */
  private isDiscarded(code: Client['presents']): boolean {
    const roundTrips = this.roundTrips()
    return roundTrips.some(
      ({ name, ending, client, attempt }, index) =>
        ['insert_user', 'set_password'].includes(name) &&
        ending === 'done' &&
        client.presents === code &&
        (isRefused(attempt) ||
          roundTrips
            .slice(index)
            .some((step) => step.attempt === attempt && ['endClaim', 'concedeClaim'].includes(step.name)))
    )
  }

  /** Whether a claim for the other purpose may hold the code: it has neither ended nor been refused. Only its retry gets the code. */
  private isHeldForOther({ presents, action }: Client): boolean {
    const roundTrips = this.roundTrips()
    return roundTrips.some(
      ({ name, client, attempt }) =>
        name === 'claimCode' &&
        client.presents === presents &&
        client.action !== action &&
        !roundTrips.some((step) => step.attempt === attempt && step.name === 'endClaim') &&
        !isRefused(attempt)
    )
  }

  /**
   * Whether another claim may have replaced the record of a client's code, because a mobile has one record. The other claim is
   * of another code, or for the other purpose. A request that reads or writes the row has claimed its code.
   */
  private isRecordReplaced({ presents, action }: Client): boolean {
    const roundTrips = this.roundTrips()
    return roundTrips.some(
      ({ name, client }) =>
        (name === 'claimCode' && client.presents !== presents && client.presents !== 'a wrong code') ||
        (rowStatements.includes(name) && client.action !== action)
    )
  }

  /** Whether a late claim may hold the code: it has run since all leases have passed. */
  private isClaimedLate(): boolean {
    const { entries } = this.history
    const passed = entries.findLastIndex(({ kind }) => kind === 'all leases have passed')
    return entries
      .slice(passed)
      .some((entry) => entry.kind === 'round trip' && entry.name === 'claimCode' && entry.ending !== 'done')
  }

  private answers(): Answer[] {
    return this.history.entries.filter((entry) => entry.kind === 'answer')
  }

  private successes(): Answer[] {
    return this.answers().filter(isSuccess)
  }

  private roundTrips() {
    return this.history.entries.filter((entry) => entry.kind === 'round trip')
  }

  private readCode(): Promise<string | null> {
    return this.system.stores.redis.get(codeKey(this.history.mobile))
  }

  private async readRow(): Promise<Row | undefined> {
    const { rows } = await this.system.stores.postgres.query<Row>(
      'SELECT id, password_hash AS phc FROM users WHERE mobile = $1',
      [this.history.mobile]
    )
    if (rows.length > 1) this.violations.push(`G2: the mobile has ${rows.length} rows`)
    return rows[0]
  }

  /** Whether the session of a reply is stored and has a current epoch. */
  private async hasSession({ cookies }: Reply, userId: string): Promise<boolean> {
    const { redis } = this.system.stores
    const sessionKey = sessionKeyOf(`sid=${cookies[0]?.value}`)
    const [stored, epoch] = await redis.mget(sessionKey, `{sessions_of:${userId}}:epoch`)
    if (!stored) return false
    const session = JSON.parse(stored)
    return session.user_id === userId && Number(session.epoch) >= Number(epoch ?? 0)
  }
}

/** Returns the password that matches the hash, or undefined if no client has it. */
async function findPassword(phc: string, clients: readonly Client[]): Promise<string | undefined> {
  for (const { password } of clients) if (await verify(phc, password)) return password
  return undefined
}
