import type { Attempt, Client, Event } from './scheduler.js'

/** The codes that clients present. */
export const codes = { 'the code': '123456', 'the new code': '654321' } as const

/** What a run leaves behind. */
export interface FinishedRun {
  clients: readonly Client[]
  events: readonly Event[]
  /** At the end each client repeats its request, without a fault. `row` is what Postgres holds just before. */
  retries: { attempt: Attempt; row: FinishedRun['rows'][number] | undefined }[]
  rows: readonly { id: string; password: string }[]
  /** The code under `sms_code_<mobile>`. */
  storedCode: string | undefined
  /** The attempts whose session GET /session accepts. */
  liveSessions: ReadonlySet<Attempt>
}

/** The promises of docs/guarantees.md: what holds after each run. */
const promises: Record<string, (run: FinishedRun) => boolean> = {
  'G1: at most one sign-up succeeds': (run) => new Set(signUps(run).map(requestOf)).size <= 1,
  'G1: a presented code never lies in Redis again': ({ storedCode, events }) =>
    [new Model(events).lying, undefined].includes(storedCode),
  'G2: the mobile has at most one row': ({ rows }) => rows.length <= 1,
  'G2: no two people have one user_id': (run) =>
    new Set(signUps(run).map(userIdOf)).size >= new Set(signUps(run).map(requestOf)).size,
  'G4: a code that nobody presented lies in Redis': ({ storedCode, events }) =>
    [storedCode, undefined].includes(new Model(events).lying),
  'G5: nobody is answered 409 whose password the row has': ({ clients, rows }) =>
    !clients.some(({ action, password, sent }) => {
      const isOwnRow = action === 'sign up' && rows[0]?.password === password
      return isOwnRow && sent.some(({ reply }) => reply?.statusCode === 409)
    })
}

/** What holds for each success. */
const promisesOfSuccess: Record<string, (success: Attempt, run: FinishedRun) => boolean> = {
  'G1: a used code serves no other request': (success, run) => {
    const same = run.clients.flatMap(({ sent }) => sent).filter((attempt) => requestOf(attempt) === requestOf(success))
    const model = modelBefore(
      run,
      ({ name, attempt }) => name === 'the request arrives' && same.some((other) => other === attempt)
    )
    return [undefined, requestOf(success)].includes(model.claimOf(success.client)?.usedFor)
  },
  'G3: it has read or written its row, and the row lasts': (success, run) =>
    proofOf(success, run) >= 0 && userIdOf(success) === run.rows[0]?.id,
  'G3: the row has its password, or that of a later reset': (success, run) =>
    run.rows[0]?.password === (laterResets(success, run).at(-1) ?? success).client.password,
  'G3: its session lives, unless a later reset ended it': (success, run) =>
    !success.reply?.json().data.session || laterResets(success, run).length > 0 || run.liveSessions.has(success),
  'G8: it was allowed to hold its code': (success, run) =>
    modelBefore(run, ({ name, attempt }) => name === 'holdCode' && attempt === success).mayHold(success.client),
  'G9: its session does not live after a successful reset': (success, run) =>
    !laterResets(success, run).some(isSuccess) || !run.liveSessions.has(success)
}

/** Returns the promises that a run has broken. */
export function brokenPromises(run: FinishedRun): string[] {
  // Otherwise a mistake in the scheduler would look like a service without bugs.
  if (!run.events.some(({ name }) => name === 'holdCode')) throw new Error('no request has presented a code')
  const broken = Object.entries(promises).filter(([, isKept]) => !isKept(run))
  const brokenOfSuccess = Object.entries(promisesOfSuccess).filter(
    ([, isKept]) => !successes(run).every((success) => isKept(success, run))
  )
  return [...[...broken, ...brokenOfSuccess].map(([promise]) => promise), ...brokenByRetries(run)]
}

/** Compares the answers to the last requests with what the model and the row promise. */
function brokenByRetries(run: FinishedRun): string[] {
  return run.retries.flatMap(({ attempt, row }) => {
    const { client, reply } = attempt
    const model = modelBefore(run, (event) => event.attempt === attempt)
    const claim = model.claimOf(client)
    const isOwnRow = row?.password === client.password
    let [expected, promise] = [422, 'G1: a code that is used or replaced is a wrong code']
    if (model.lying === codes[client.presents] || claim) {
      const isVain = claim?.usedFor === '' && model.lying !== codes[client.presents]
      if (isVain && client.action === 'sign up') [expected, promise] = [409, 'G5: a code used in vain stays a conflict']
      else if (isVain) return []
      else if (isOwnRow) [expected, promise] = [200, 'G5: a request that has written succeeds when it is repeated']
      else if (client.action === 'sign up' ? !row : row && claim?.usedFor === undefined)
        [expected, promise] = [200, 'G4: a request that has not written succeeds when it is repeated']
      else if (client.action === 'sign up') [expected, promise] = [409, 'G5: a conflict stays one when it is repeated']
    }
    const isKept = expected === 200 ? reply?.json().data?.session : reply?.statusCode === expected
    return isKept ? [] : [promise]
  })
}

/** Identical requests share one success. */
const requestOf = ({ client: { action, password } }: Attempt) => `${action} with ${password}`
const isSuccess = ({ reply }: Attempt) => reply?.json().errno === '0'
const userIdOf = ({ reply }: Attempt) => reply?.json().data.user_id
const successes = ({ clients }: FinishedRun) => clients.flatMap(({ sent }) => sent).filter(isSuccess)
const signUps = (run: FinishedRun) => successes(run).filter(({ client }) => client.action === 'sign up')

/** Returns the index of the statement that showed a request the row of its user, or -1. */
const proofOf = (success: Attempt, { events }: FinishedRun) =>
  events.findLastIndex(
    ({ name, attempt }) => attempt === success && ['insert_user', 'find_user', 'set_password'].includes(name)
  )

/** Returns the requests that have replaced the password since a success. */
const laterResets = (success: Attempt, run: FinishedRun) =>
  run.events
    .slice(proofOf(success, run) + 1)
    .flatMap(({ name, attempt }) => (name === 'set_password' && attempt ? [attempt] : []))

/** Returns the model as it was before the first such event. */
const modelBefore = ({ events }: FinishedRun, isMeant: (event: Event) => boolean) =>
  new Model(events.slice(0, Math.max(0, events.findIndex(isMeant))))

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
  private claim: { first: Client; lastHolder?: Attempt; usedFor?: string; wrongPasswords: number } | undefined

  constructor(events: readonly Event[]) {
    for (const { name, attempt, code } of events) {
      if (name === 'the code changes') this.lying = code
      if (name === 'the lease passes') this.holder = undefined
      if (attempt && name === 'holdCode' && this.mayHold(attempt.client)) this.hold(attempt)
      if (attempt && name.startsWith('release ') && this.claim?.lastHolder === attempt) this.release(attempt, name)
    }
  }

  /** Returns the claim of a client's code, unless it was presented first for another purpose. */
  claimOf({ presents, action }: Client) {
    return this.claim?.first.presents === presents && this.claim.first.action === action ? this.claim : undefined
  }

  mayHold(client: Client): boolean {
    const claim = this.claimOf(client)
    return codes[client.presents] === this.lying || (!!claim && claim.usedFor !== '' && !this.holder)
  }

  private hold(attempt: Attempt): void {
    if (codes[attempt.client.presents] === this.lying) {
      this.claim = { first: attempt.client, wrongPasswords: 0 }
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
