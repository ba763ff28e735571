import type { Attempt, Client, Event } from './scheduler.js'

/** The codes that clients present. */
export const codes = { 'the code': '123456', 'the new code': '654321' } as const

interface Row {
  id: string
  password: string
}

/** What a run leaves behind. */
export interface FinishedRun {
  clients: readonly Client[]
  events: readonly Event[]
  /** At the end each client repeats its request, without a fault. `row` is what Postgres holds just before. */
  retries: { attempt: Attempt; row: Row | undefined }[]
  rows: readonly Row[]
  /** The code under `sms_code_<mobile>`. */
  storedCode: string | undefined
  /** The attempts whose session GET /session accepts. */
  liveSessions: ReadonlySet<Attempt>
}

/** The promises of docs/guarantees.md. Each returns whether a run has kept it. */
const promises: Record<string, (run: FinishedRun) => boolean | undefined> = {
  'G1: a presented code never lies in Redis again': ({ storedCode, events }) =>
    storedCode === undefined || storedCode === new Model(events).lying,
  'G1: at most one sign-up succeeds': (run) => new Set(successfulSignUps(run).map(requestOf)).size <= 1,
  'G1: a used code serves no other request': (run) =>
    successes(run).every((success) => {
      const request = requestOf(success)
      const usedFor = modelBefore(run, ({ name, attempt }) => {
        return name === 'the request arrives' && attempt !== undefined && requestOf(attempt) === request
      }).claimOf(success.client)?.usedFor
      return usedFor === undefined || usedFor === request
    }),
  'G2: the mobile has at most one row': ({ rows }) => rows.length <= 1,
  'G2: one user_id belongs to one person': (run) => {
    const owners = new Map(successfulSignUps(run).map((attempt) => [userIdOf(attempt), attempt.client.password]))
    return successfulSignUps(run).every((attempt) => owners.get(userIdOf(attempt)) === attempt.client.password)
  },
  'G3: a success has read or written its row, and the row lasts': (run) =>
    successes(run).every((success) => proofOf(run, success) >= 0 && userIdOf(success) === run.rows[0]?.id),
  'G3: the row has the password of the last success': (run) =>
    successes(run).every((success) => {
      const lastWriter = laterResets(run, success).at(-1) ?? success
      return run.rows[0]?.password === lastWriter.client.password
    }),
  'G3: a session that was announced lives, unless a reset ended it': (run) =>
    successes(run).every((success) => {
      const isAnnounced = success.reply?.json().data.session
      return !isAnnounced || laterResets(run, success).length > 0 || run.liveSessions.has(success)
    }),
  'G4: a code that nobody presented still lies in Redis': ({ storedCode, events }) => {
    const { lying } = new Model(events)
    return lying === undefined || storedCode === lying
  },
  'G4: a request that has not written succeeds when it is repeated': (run) =>
    areRetriesAnswered(run, (status, isOwnRow) => status < 300 && !isOwnRow),
  'G5: a request that has written succeeds when it is repeated': (run) =>
    areRetriesAnswered(run, (status, isOwnRow) => status < 300 && isOwnRow),
  'G5: a conflict stays a conflict when it is repeated': (run) => areRetriesAnswered(run, (status) => status === 409),
  'G5: nobody is answered 409 whose password the row has': ({ clients, rows }) =>
    clients.every(({ action, password, sent }) => {
      const isRefused = action === 'sign up' && sent.some(({ reply }) => reply?.statusCode === 409)
      return !isRefused || rows[0]?.password !== password
    }),
  'G8: a success was allowed to hold its code': (run) =>
    successes(run).every((success) =>
      modelBefore(run, ({ name, attempt }) => name === 'holdCode' && attempt === success).mayHold(success.client)
    ),
  'G1: a code that is used or replaced is a wrong code': (run) => areRetriesAnswered(run, (status) => status === 422),
  'G9: no earlier session lives after a successful reset': (run) =>
    successes(run).every((success) => !laterResets(run, success).some(isSuccess) || !run.liveSessions.has(success))
}

/** Returns the promises that a run has broken. */
export function brokenPromises(run: FinishedRun): string[] {
  // Otherwise a mistake in the scheduler would look like a service without bugs.
  if (!run.events.some(({ name }) => name === 'holdCode')) throw new Error('no request has presented a code')
  return Object.keys(promises).filter((promise) => !promises[promise]?.(run))
}

/** Requests that are the same have one success. */
const requestOf = ({ client: { action, password } }: Attempt) => `${action} with ${password}`
const isSuccess = ({ reply }: Attempt) => reply?.json().errno === '0'
const userIdOf = ({ reply }: Attempt) => reply?.json().data.user_id
const successes = ({ clients }: FinishedRun) => clients.flatMap(({ sent }) => sent).filter(isSuccess)
const successfulSignUps = (run: FinishedRun) => successes(run).filter(({ client }) => client.action === 'sign up')

/** Returns the index of the statement that showed a request the row of its user, or -1. */
const proofOf = ({ events }: FinishedRun, success: Attempt) =>
  events.findLastIndex(
    ({ name, attempt }) => attempt === success && ['insert_user', 'find_user', 'set_password'].includes(name)
  )

/** Returns the requests that have replaced the password since a success. */
const laterResets = (run: FinishedRun, success: Attempt) =>
  run.events
    .slice(proofOf(run, success) + 1)
    .flatMap(({ name, attempt }) => (name === 'set_password' && attempt ? [attempt] : []))

const modelBefore = ({ events }: FinishedRun, isMeant: (event: Event) => boolean) =>
  new Model(events.slice(0, Math.max(0, events.findIndex(isMeant))))

/** Whether the retries that should get such a status get it, and a session with a success. */
function areRetriesAnswered(run: FinishedRun, isMeant: (status: number, isOwnRow: boolean) => boolean): boolean {
  return run.retries.every(({ attempt, row }) => {
    const { client, reply } = attempt
    const model = modelBefore(run, (event) => event.attempt === attempt)
    const claim = model.claimOf(client)
    const isOwnRow = row?.password === client.password
    let expected = 422
    if (model.lying === codes[client.presents] || claim) {
      if (client.action === 'sign up') expected = isOwnRow || !row ? 201 : 409
      else if (isOwnRow || (row && claim?.usedFor === undefined)) expected = 200
    }
    if (!isMeant(expected, isOwnRow)) return true
    return reply?.statusCode === expected && (expected >= 300 || reply.json().data.session)
  })
}

/**
 * The protocol of docs/guarantees.md, from the round trips that the stores have run. A code lies in Redis until a request
 * presents it. From then on the same request can repeat it, until another code of the mobile is presented, or two requests
 * with the used code had a wrong password.
 */
export class Model {
  /** The code that lies under `sms_code_<mobile>`. */
  lying: string | undefined
  /** The request whose lease runs. */
  holder: Attempt | undefined
  /** `lastHolder` may release the code after its lease, too. `usedFor` is a request, or '' if the code was used in vain. */
  private claim:
    | { code: string; purpose: string; lastHolder?: Attempt; usedFor?: string; wrongPasswords: number }
    | undefined

  constructor(events: readonly Event[]) {
    for (const { name, attempt, code } of events) {
      if (name === 'the code changes') this.lying = code
      if (name === 'the lease passes') this.holder = undefined
      if (attempt && name === 'holdCode' && this.mayHold(attempt.client)) this.hold(attempt)
      if (attempt && name.startsWith('release ') && this.claim?.lastHolder === attempt) this.release(attempt, name)
    }
  }

  /** Returns the claim of a client's code, unless the code lies in Redis again: another service may have sent it twice. */
  claimOf({ presents, action }: Client) {
    return this.claim?.code === codes[presents] && this.claim.purpose === action ? this.claim : undefined
  }

  mayHold(client: Client): boolean {
    const claim = this.claimOf(client)
    return codes[client.presents] === this.lying || (!!claim && claim.usedFor !== '' && !this.holder)
  }

  private hold(attempt: Attempt): void {
    const { presents, action } = attempt.client
    if (codes[presents] === this.lying) {
      this.claim = { code: this.lying, purpose: action, wrongPasswords: 0 }
      this.lying = undefined
    }
    if (this.claim) this.claim.lastHolder = attempt
    this.holder = attempt
  }

  private release(attempt: Attempt, name: string): void {
    const { claim } = this
    this.holder = undefined
    if (claim === undefined) return
    delete claim.lastHolder
    if (name === 'release used') claim.usedFor = requestOf(attempt)
    if (name === 'release used_in_vain') claim.usedFor = ''
    if (name !== 'release wrong_password' || ++claim.wrongPasswords < 2) return
    // Without a use it is a conflict that nobody had heard of, and stays one.
    if (claim.usedFor === undefined) claim.usedFor = ''
    else this.claim = undefined
  }
}
