import { AsyncLocalStorage } from 'node:async_hooks'
import { randomInt } from 'node:crypto'
import { setImmediate as endOfPass } from 'node:timers/promises'
import { buildApp } from '#src/app.js'
import { loadConfig } from '#src/config/config.js'
import type { RedisStore } from '#src/stores/redis.js'
import { StoreUnavailable } from '#src/stores/store-unavailable.js'
import { client as apiClient, type Reply } from '../../testkit/client.js'
import type { PrivateStores } from '../../testkit/private-stores.js'
import { claimKey, patient, wideGuessLimits } from '../../testkit/testbed.js'
import type { Bug } from './bugs.js'
import { codes, type FinishedRun, Model } from './checks.js'
import type { ClientSpec, Scenario } from './scenarios.js'

/** What may happen to a round trip, first the usual. A late one is none of them: slow scenarios have the same orders. */
const endings = ['done', 'reply lost', 'request lost', 'process dies before', 'process dies after'] as const
type Ending = (typeof endings)[number]

/** A client of one run, and its requests so far. */
export interface Client extends ClientSpec {
  sent: Attempt[]
}

/** One request, from its arrival to its reply, or to the death of its process. */
export interface Attempt {
  readonly client: Client
  /** The round trips that it waits for. */
  steps: readonly Step[]
  reply?: Reply
  isDead: boolean
}

/** A round trip to a store. It waits for the scheduler, which lets the store run it, and then gives the request an end. */
interface Step {
  name: string
  perform(): Promise<void>
  answer(): void
  timeOut(): void
}

/** A store has run a round trip with this name, or `the request arrives`, `the code changes`, `the lease passes`. */
export interface Event {
  name: string
  attempt?: Attempt
  /** Lies in Redis from now on. */
  code?: string | undefined
}

type RedisClient = Parameters<Parameters<RedisStore['run']>[0]>[0]
export type System = Awaited<ReturnType<typeof startSystem>>

/** Starts the service on real stores. It stops before each round trip of a request. */
export async function startSystem(stores: PrivateStores, bug?: Bug) {
  const settings = { ...stores.environment, ...patient, ...wideGuessLimits, DOCS: 'false' }
  const app = await buildApp(loadConfig(settings), { logStream: { write: () => undefined } })
  const { redis: store, postgres, passwords } = app.mobileSignup
  const redis = await store.run(async (client) => client)
  const current = new AsyncLocalStorage<Attempt>()
  /** Counts what happens, so that `settle` sees when nothing more does. */
  let activity = 0

  function stop<T>(name: string, send: () => Promise<T>): Promise<T> {
    const attempt = current.getStore()
    if (attempt === undefined) return send()
    activity++
    const timeout = () => new StoreUnavailable('redis', new Error('Command timed out'))
    if (attempt.isDead) return Promise.reject(timeout())
    return new Promise((resolve, reject) => {
      let result: Promise<T>
      const perform = async () => {
        result = send()
        await result.catch(() => undefined)
      }
      const step = { name, perform, answer: () => resolve(result), timeOut: () => reject(timeout()) }
      attempt.steps = [...attempt.steps, step]
    })
  }

  const { run } = store
  store.run = (commands) => stop(nameOf(commands, redis), () => run(commands))
  const { query } = postgres
  const stopQuery = (...args: Parameters<typeof query>) => stop(`${args[0].name}`, () => query(...args))
  Object.assign(postgres, { query: stopQuery })
  // A hash changes nothing that others see, so it is no step, and a password may stand for its hash.
  passwords.hash = async (password) => password
  passwords.verify = async (stored, password) => stored === password
  bug?.plant(app.mobileSignup)

  return {
    app,
    stores,
    start: (attempt: Attempt, send: () => Promise<Reply>) =>
      current.run(attempt, async () => {
        const reply = await send()
        activity++
        if (!attempt.isDead) attempt.reply = reply
      }),
    /** Waits until all requests wait for a round trip, or have ended: nothing happens in six passes of the event loop. */
    async settle(): Promise<void> {
      for (let seen = -1; seen !== activity; ) {
        seen = activity
        for (let pass = 0; pass < 6; pass++) await endOfPass()
      }
    }
  }
}

/** Returns the first command that `commands` sends, such as `holdCode` or `release used`. Nothing is sent. */
function nameOf(commands: (redis: RedisClient) => Promise<unknown>, redis: RedisClient): string {
  let name = ''
  const get = (_: unknown, command: string | symbol) => {
    return (...args: unknown[]) => {
      name ||= command === 'releaseCode' ? `release ${args.at(-2)}` : String(command)
      return new Promise(() => undefined)
    }
  }
  commands(new Proxy<RedisClient>(redis, { get }))
  return name
}

/** Changes a claim in Redis, if there is one. */
export async function editClaim(redis: RedisClient, key: string, edit: (until: number) => object): Promise<void> {
  const claim = JSON.parse((await redis.get(key)) ?? 'null')
  if (claim) await redis.set(key, JSON.stringify({ ...claim, ...edit(claim.until) }), 'KEEPTTL')
}

interface Option {
  text: string
  sender?: Client
  perform(): Promise<unknown>
}

let nextMobile = 13_000_000_000 + randomInt(1_000_000_000)

/**
 * Runs a scenario once.
 *
 * @param choose returns which of so many options is next. Option 0: the client that went last goes on, without a fault.
 * @returns also a log with each choice and each answer in a line
 */
export async function play(
  { app, stores: { postgres, redis }, start, settle }: System,
  scenario: Scenario,
  choose: (options: number) => number
): Promise<FinishedRun & { log: readonly string[] }> {
  const { signUp, resetPassword, whoAmI } = apiClient(app)
  const mobile = `${nextMobile++}`
  const clients: Client[] = scenario.clients.map((spec) => ({ ...spec, sent: [] }))
  const events: Event[] = []
  const log: string[] = []
  let pendingEvent: Scenario['event']
  let lastSender: Client | undefined
  const select = 'SELECT id, password_hash AS password FROM users WHERE mobile = $1'
  const readRows = async (): Promise<FinishedRun['rows']> => (await postgres.query(select, [mobile])).rows

  const insert = `INSERT INTO users (name, mobile, password_hash) VALUES ($1, $1, 'a former password')`
  if (scenario.isRegistered) await postgres.query(insert, [mobile])
  await changeCode(codes['the code'])
  pendingEvent = scenario.event
  for (let options = nextOptions(); options.length > 0; options = nextOptions()) {
    const option = options[choose(options.length)]
    if (option === undefined) throw new Error('no such option')
    lastSender = option.sender ?? lastSender
    log.push(option.text)
    await option.perform()
  }
  // A request that waits for something else than a step would end the run before its orders have been tried.
  const unfinished = clients.flatMap(({ sent }) => sent).find(({ isDead, reply }) => !isDead && !reply)
  if (unfinished) throw new Error(`a request of ${unfinished.client.name} has neither step nor reply`)
  await passLease()
  const retries: FinishedRun['retries'] = []
  for (const client of clients.filter(({ sent }) => sent.length > 0)) {
    const [row] = await readRows()
    log.push(`${client.name}: after all leases, the request arrives once more`)
    const attempt = await arrive(client)
    for (let [step] = attempt.steps; step; [step] = attempt.steps) await endStep(attempt, step, 'done')
    retries.push({ attempt, row })
  }
  const liveSessions = new Set<Attempt>()
  for (const attempt of clients.flatMap(({ sent }) => sent)) {
    const cookie = attempt.reply?.cookies.find(({ name }) => name === 'sid')
    if (cookie && (await whoAmI(`sid=${cookie.value}`)).statusCode === 200) liveSessions.add(attempt)
  }
  const storedCode = (await redis.get(`sms_code_${mobile}`)) ?? undefined
  return { clients, events, retries, rows: await readRows(), storedCode, liveSessions, log }

  /** Returns what may happen next, first what usually does. */
  function nextOptions(): Option[] {
    const byTurn = lastSender ? [lastSender, ...clients.filter((client) => client !== lastSender)] : clients
    const usual = byTurn.flatMap(usualOption)
    const code = pendingEvent === 'a new code is sent' ? codes['the new code'] : undefined
    const event = pendingEvent ? [{ text: pendingEvent, perform: () => changeCode(code) }] : []
    if (usual.length === 0) return event
    const lease = new Model(events).holder ? [{ text: 'the lease passes', perform: passLease }] : []
    return [...usual, ...byTurn.flatMap(otherOptions), ...lease, ...event]
  }

  /** Returns what a client does next if nothing goes wrong. */
  function usualOption(sender: Client): Option[] {
    const attempt = sender.sent.at(-1)
    const [step] = attempt?.steps ?? []
    if (attempt && step) return [stepOption(attempt, step, 'done')]
    const isAnswered = attempt && !attempt.isDead && (attempt.reply?.statusCode ?? 0) < 500
    if (isAnswered || sender.sent.length === sender.attempts) return []
    if (sender.presents === 'the new code' && pendingEvent) return []
    return [{ text: `${sender.name}: the request arrives`, sender, perform: () => arrive(sender) }]
  }

  /** Round trips that a request has sent together may run in any order, and the next one may fail. */
  function otherOptions({ sent }: Client): Option[] {
    const attempt = sent.at(-1)
    const [next, ...others] = attempt?.steps ?? []
    if (!attempt || !next) return []
    const swaps = others.map((step) => stepOption(attempt, step, 'done'))
    return [...swaps, ...endings.slice(1).map((ending) => stepOption(attempt, next, ending))]
  }

  function stepOption(attempt: Attempt, step: Step, ending: Ending): Option {
    const text = `${attempt.client.name}: ${step.name}${ending === 'done' ? '' : `, ${ending}`}`
    return { text, sender: attempt.client, perform: () => endStep(attempt, step, ending) }
  }

  async function changeCode(code: string | undefined): Promise<void> {
    const key = `sms_code_${mobile}`
    await (code ? redis.set(key, code, 'EX', 3_600) : redis.del(key))
    events.push({ name: 'the code changes', code })
    pendingEvent = undefined
  }

  /** Moves the end of the lease into the past, so that nobody waits for it. */
  async function passLease(): Promise<void> {
    await editClaim(redis, claimKey(mobile), (until) => ({ until: Math.min(until, 1) }))
    events.push({ name: 'the lease passes' })
  }

  async function arrive(client: Client): Promise<Attempt> {
    const { action, presents, password, sent } = client
    const body = { mobile, sms_code: codes[presents], password, password2: password }
    const attempt: Attempt = { client, steps: [], isDead: false }
    if (scenario.isSlow) await passLease()
    sent.push(attempt)
    events.push({ name: 'the request arrives', attempt })
    start(attempt, () => (action === 'sign up' ? signUp(body) : resetPassword(body)))
    await untilStopped(attempt)
    return attempt
  }

  async function endStep(attempt: Attempt, step: Step, ending: Ending): Promise<void> {
    const { steps } = attempt
    attempt.isDead = ending.startsWith('process dies')
    attempt.steps = attempt.isDead ? [] : steps.filter((other) => other !== step)
    if (!['request lost', 'process dies before'].includes(ending)) {
      events.push({ name: step.name, attempt })
      await step.perform()
    }
    if (ending === 'done') step.answer()
    // The request of a dead process reaches no store any more. It ends, so that the application can be closed.
    else for (const unanswered of attempt.isDead ? steps : [step]) unanswered.timeOut()
    await untilStopped(attempt)
  }

  async function untilStopped(attempt: Attempt): Promise<void> {
    await settle()
    const { client, reply, steps } = attempt
    if (reply === undefined) return
    log.push(`${client.name}: the answer is ${reply.statusCode} ${reply.json().errno}`)
    // After a failure it does not wait for what else it has sent.
    for (const step of steps) step.timeOut()
    attempt.steps = []
  }
}
