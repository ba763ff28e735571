import { verify } from '@node-rs/argon2'
import type { Reply } from '../../testkit/client.js'
import type { PrivateStores } from '../../testkit/private-stores.js'
import { sessionKeyOf } from '../../testkit/testbed.js'
import { type Attempt, type Client, type History, Protocol, requestOf } from './protocol.js'

interface Row {
  id: string
  phc: string
}

const isSuccess = ({ reply }: Attempt) => reply?.json().errno === '0'

/** The statements that read or write the row of a user. Each success has run one of them. */
const rowStatements = ['insert_user', 'find_user', 'set_password']

/** Compares a run with the guarantees of docs/guarantees.md. */
export class Checks {
  readonly violations: string[] = []

  constructor(
    private readonly stores: PrivateStores,
    private readonly history: History
  ) {}

  /** A code that was presented never lies in Redis again, and one that was not presented still lies there. */
  async checkCode(): Promise<void> {
    const stored = await this.stores.redis.get(`sms_code_${this.history.mobile}`)
    const expected = new Protocol(this.history).lying ?? null
    if (stored === expected) return
    this.violations.push(stored === null ? `G4: the code ${expected} is lost` : `G1: the code ${stored} is back`)
  }

  /** Sends a request once more, without a fault and while no other request is running, and checks its answer. */
  async checkRetry(client: Client, retry: () => Promise<void>): Promise<void> {
    const row = await this.readRow()
    const isOwn = row !== undefined && (await verify(row.phc, client.password))
    const expected = this.expectedStatus(client, row !== undefined, isOwn)
    await retry()
    const reply = client.sent.at(-1)?.reply
    if (reply === undefined) throw new Error(`the retry of ${client.name} has no answer`)
    if (expected === undefined) return
    const guarantee = { 429: 'G8', 422: 'G1', 409: 'G5' }[expected] ?? (isOwn ? 'G5' : 'G4')
    if (reply.statusCode !== expected) {
      this.violations.push(`${guarantee}: the retry of ${client.name} is answered ${reply.statusCode}, not ${expected}`)
    } else if (expected < 300 && !reply.json().data.session) {
      this.violations.push(`G5: the retry of ${client.name} has no session`)
    }
  }

  /** Returns undefined while a late request holds the code. */
  private expectedStatus(client: Client, isRegistered: boolean, isOwn: boolean): number | undefined {
    const protocol = new Protocol(this.history)
    const answer = protocol.answerTo(client)
    if (answer !== 'held') return { 'in progress': undefined, spent: 429, wrong: 422 }[answer]
    if (client.action === 'sign up') return isOwn || !isRegistered ? 201 : 409
    return isOwn || (isRegistered && protocol.usedFor(client) === undefined) ? 200 : 422
  }

  async checkEnd(): Promise<void> {
    const { clients, entries } = this.history
    if (!entries.some((entry) => entry.kind === 'round trip' && entry.name === 'holdCode')) {
      throw new Error('no request has held a code, so nothing has been checked')
    }
    await this.checkCode()
    const row = await this.readRow()
    for (const success of this.successes()) {
      this.checkUse(success)
      await this.checkRow(success, row)
    }
    const signUps = clients.filter(({ action }) => action === 'sign up')
    const successful = signUps.filter(({ sent }) => sent.some(isSuccess))
    if (new Set(successful.map(requestOf)).size > 1) this.violations.push('G1: two sign-ups succeed')
    for (const { name, password, sent } of signUps) {
      const isRefused = sent.some(({ reply }) => reply?.statusCode === 409)
      if (isRefused && row && (await verify(row.phc, password))) {
        this.violations.push(`G5: ${name} is answered 409, although the row has its password`)
      }
    }
  }

  /**
   * A success has held its code, and was allowed to. When Redis has run the release of a success, no other request that arrives
   * later succeeds with the same code. Without the release, another reset can hold the code after the lease.
   */
  private checkUse(success: Attempt): void {
    const { client } = success
    const { entries } = this.history
    const hold = entries.findIndex(
      (entry) => entry.kind === 'round trip' && entry.name === 'holdCode' && entry.attempt === success
    )
    const answer = hold === -1 ? 'never presented' : new Protocol(this.history, hold).answerTo(client)
    if (answer !== 'held') this.violations.push(`G8: ${client.name} succeeds, and its code was ${answer}`)
    const request = requestOf(client)
    const arrival = entries.findIndex(
      (entry) => entry.kind === 'arrival' && requestOf(entry.attempt.client) === request
    )
    const usedFor = new Protocol(this.history, arrival).usedFor(client) ?? request
    if (usedFor !== request) this.violations.push(`G1: ${client.name} succeeds with a code that was used: ${usedFor}`)
  }

  /** The row of a success lasts. A later reset replaces its password, and ends its session. */
  private async checkRow(success: Attempt, row: Row | undefined): Promise<void> {
    const { violations } = this
    const { client, reply } = success
    if (reply === undefined) return
    const { user_id: userId, session } = reply.json().data
    const roundTrips = this.history.entries.filter((entry) => entry.kind === 'round trip')
    const proof = roundTrips.findLastIndex(({ attempt, name }) => attempt === success && rowStatements.includes(name))
    const resets = roundTrips.slice(proof + 1).filter(({ name }) => name === 'set_password')
    const writer = resets.at(-1)?.attempt.client ?? client
    if (proof === -1) violations.push(`G3: ${client.name} succeeds without its row`)
    if (row?.id !== userId) violations.push(`G3: ${client.name} got user ${userId}, but the row has ${row?.id}`)
    else if (!(await verify(row.phc, writer.password))) violations.push(`G3: the password of ${writer.name} is lost`)
    const isLive = await this.hasSession(reply, userId)
    if (session && resets.length === 0 && !isLive) violations.push(`G3: ${client.name} has no session`)
    const isReset = resets.some(({ attempt }) => isSuccess(attempt))
    if (isReset && isLive) violations.push(`G9: the session of ${client.name} lives after a later reset`)
  }

  private successes(): Attempt[] {
    return this.history.clients.flatMap(({ sent }) => sent).filter(isSuccess)
  }

  private async readRow(): Promise<Row | undefined> {
    const select = 'SELECT id, password_hash AS phc FROM users WHERE mobile = $1'
    const { rows } = await this.stores.postgres.query<Row>(select, [this.history.mobile])
    if (rows.length > 1) this.violations.push(`G2: the mobile has ${rows.length} rows`)
    return rows[0]
  }

  /** Whether the session of a reply is stored and has a current epoch. */
  private async hasSession({ cookies }: Reply, userId: string): Promise<boolean> {
    const sessionKey = sessionKeyOf(`sid=${cookies[0]?.value}`)
    const [stored, epoch] = await this.stores.redis.mget(sessionKey, `{sessions_of:${userId}}:epoch`)
    if (!stored) return false
    const session = JSON.parse(stored)
    return session.user_id === userId && Number(session.epoch) >= Number(epoch ?? 0)
  }
}
