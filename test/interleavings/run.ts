import { randomInt, randomUUID } from 'node:crypto'
import { buildApp } from '#src/app.js'
import { loadConfig } from '#src/config/config.js'
import { client as apiClient } from '../../testkit/client.js'
import type { PrivateStores } from '../../testkit/private-stores.js'
import { claimKey, patient, wideGuessLimits } from '../../testkit/testbed.js'
import { type Bug, editClaim } from './bugs.js'
import { Checks } from './checks.js'
import { type Attempt, type Client, codes, type History, Protocol } from './protocol.js'
import { cheapHash, type Ending, endings, hasRun, Requests, type Step } from './requests.js'
import type { Scenario, ScenarioEvent } from './scenarios.js'

/** Longer than a run. The end of a code is an event of its own. */
const codeLifeSeconds = 3_600

const [, ...faults] = endings

export type System = Awaited<ReturnType<typeof startSystem>>

/** Starts the service on real stores. Its requests go step by step. */
export async function startSystem(stores: PrivateStores, { guesses }: Scenario, bug?: Bug) {
  const guessLimit = guesses !== undefined && { SMS_CODE_ATTEMPTS: `${guesses}` }
  const settings = { ...stores.environment, ...patient, ...wideGuessLimits, ...guessLimit, DOCS: 'false' }
  const app = await buildApp(loadConfig(settings), { logStream: { write: () => undefined } })
  const redis = await app.mobileSignup.redis.run((client) => Promise.resolve(client))
  const requests = new Requests(app, redis)
  bug?.plant(app.mobileSignup, redis)
  return { app, stores, requests }
}

interface Option {
  text: string
  /** Absent if no client acts. */
  sender?: Client
  perform(): Promise<unknown>
}

const end: Option = { text: 'all clients have their answers', perform: async () => undefined }

let nextMobile = 13_000_000_000 + randomInt(1_000_000_000)

/** Runs a scenario once, and compares the end with the guarantees. */
export class Run {
  private readonly history: History
  private readonly checks: Checks
  /** What a store may still run. */
  private late: { attempt: Attempt; step: Step }[] = []
  /** How many events of the scenario have happened. */
  private events = 0
  private issuedCode = ''
  private lastClient: Client | undefined
  /** Each choice and each answer in a line. */
  readonly log: string[] = []

  /** @param chooseOption option 0: the client that went last goes on, or else the first that can, without a fault */
  constructor(
    private readonly system: System,
    private readonly scenario: Scenario,
    private readonly chooseOption: (options: number) => number
  ) {
    const clients = scenario.clients.map((spec) => ({ ...spec, sent: [] }))
    this.history = { mobile: `${nextMobile++}`, clients, guesses: scenario.guesses ?? 5, entries: [] }
    this.checks = new Checks(system.stores, this.history)
  }

  /** @returns the violations */
  async play(): Promise<readonly string[]> {
    const { scenario, checks } = this
    const { mobile, clients } = this.history
    if (scenario.isRegistered) {
      const insert = 'INSERT INTO users (name, mobile, password_hash) VALUES ($1, $1, $2)'
      await this.system.stores.postgres.query(insert, [mobile, cheapHash('a former password')])
    }
    await this.happen('the code is sent')
    while ((await this.choose(this.options())) !== end);
    // A request that waits for something else than a step would end the run before its orders have been tried.
    const unfinished = clients.flatMap(({ sent }) => sent).find(({ isDead, reply }) => !isDead && reply === undefined)
    if (unfinished) throw new Error(`a request of ${unfinished.client.name} has neither step nor reply`)
    await checks.checkCode()
    const mayHoldCode = this.late.length > 0
    await this.retryAll()
    // A late request may have held the code while the clients retried.
    if (mayHoldCode) await this.retryAll()
    await checks.checkEnd()
    return checks.violations
  }

  /**
   * All leases pass. Then each client that has a code sends its request once more, without a fault. Late requests may run before
   * and between, and the others run after that.
   */
  private async retryAll(): Promise<void> {
    await this.passLease()
    const waiting = this.history.clients.filter(({ sent, presents }) => sent.length > 0 && presents !== 'a wrong code')
    while (waiting.length + this.late.length > 0) {
      const retries = waiting.slice(0, 1).map((sender) => ({
        text: `${sender.name}: after all leases, the request arrives once more`,
        sender,
        perform: async () => {
          waiting.shift()
          await this.checks.checkRetry(sender, async () => {
            const attempt = await this.arrive(sender)
            for (let [step] = attempt.steps; step; [step] = attempt.steps) await this.endStep(attempt, step, 'done')
          })
        }
      }))
      await this.choose([...retries, ...this.lateOptions()])
    }
  }

  private async choose(options: readonly Option[]): Promise<Option> {
    const chosen = options[this.chooseOption(options.length)]
    if (chosen === undefined) throw new Error('no such option')
    this.log.push(chosen.text)
    this.lastClient = chosen.sender ?? this.lastClient
    await chosen.perform()
    return chosen
  }

  /** Returns what may happen next, first what usually does. */
  private options(): Option[] {
    const { lastClient } = this
    const { clients } = this.history
    const byTurn = lastClient ? [lastClient, ...clients.filter((client) => client !== lastClient)] : clients
    const usual = byTurn.flatMap((client) => this.usualOption(client))
    const others = byTurn.flatMap((client) => this.otherOptions(client))
    const [event, late] = [this.eventOptions(), this.lateOptions()]
    const lease = { text: 'the lease passes', perform: () => this.passLease() }
    const { isHeld } = new Protocol(this.history)
    if (usual.length > 0) return [...usual, ...others, ...(isHeld ? [lease] : []), ...late, ...event]
    const isOver = this.events === 0 || event.length === 0
    return isOver ? [end, ...late, ...event] : [...event, ...late]
  }

  /** Returns what a client does next if nothing goes wrong. */
  private usualOption(sender: Client): Option[] {
    const attempt = sender.sent.at(-1)
    const [step] = attempt?.steps ?? []
    if (attempt && step) return [this.stepOption(attempt, step, 'done')]
    // It sends its request again after a 5xx, or if the process has died with it.
    const isAnswered = attempt && !attempt.isDead && (attempt.reply?.statusCode ?? 0) < 500
    const hasCode = sender.presents !== 'the new code' || this.events > 0
    if (isAnswered || sender.sent.length === sender.attempts || !hasCode) return []
    const perform = async () => {
      if (this.scenario.isSlow) await this.passLease()
      await this.arrive(sender)
    }
    const fault = attempt ? undefined : sender.firstAttempt
    return [{ text: `${sender.name}: the request arrives${fault ? `, and ${fault}` : ''}`, sender, perform }]
  }

  /** Round trips that a request has sent together may run in any order, and the next one may fail. */
  private otherOptions({ sent }: Client): Option[] {
    const attempt = sent.at(-1)
    if (attempt === undefined) return []
    const [next, ...others] = attempt.steps
    const swaps = others.map((step) => this.stepOption(attempt, step, 'done'))
    return next ? [...swaps, ...faults.map((ending) => this.stepOption(attempt, next, ending))] : []
  }

  private stepOption(attempt: Attempt, step: Step, ending: Ending): Option {
    const text = `${attempt.client.name}: ${step.name}${ending === 'done' ? '' : `, ${ending}`}`
    return { text, sender: attempt.client, perform: () => this.endStep(attempt, step, ending) }
  }

  private lateOptions(): Option[] {
    return this.late.map((lateStep) => {
      const { attempt, step } = lateStep
      const perform = async () => {
        this.late = this.late.filter((other) => other !== lateStep)
        this.history.entries.push({ kind: 'round trip', attempt, name: step.name })
        await step.perform()
      }
      return { text: `${attempt.client.name}: the late ${step.name} runs`, perform }
    })
  }

  private eventOptions(): Option[] {
    const [event] = this.scenario.events?.slice(this.events) ?? []
    if (event === undefined) return []
    const perform = () => {
      this.events++
      return this.happen(event)
    }
    return [{ text: event, perform }]
  }

  private async happen(event: ScenarioEvent | 'the code is sent'): Promise<void> {
    const { app, stores } = this.system
    const { mobile, entries } = this.history
    let code: string | undefined
    if (event === 'the code is sent') code = codes['the code']
    if (event === 'a new code is sent') code = codes['the new code']
    if (code !== undefined) await stores.redis.set(`sms_code_${mobile}`, code, 'EX', codeLifeSeconds)
    if (event === 'the code expires') await stores.redis.del(`sms_code_${mobile}`)
    if (event === 'a code is issued') {
      code = (await app.mobileSignup.codes.issue(mobile, undefined, { id: randomUUID(), network: '192.0.2.9' })).code
      this.issuedCode = code
    }
    if (event === 'that code is withdrawn') await app.mobileSignup.codes.withdraw(mobile, this.issuedCode)
    entries.push({ kind: 'code', code })
  }

  /** Moves the end of the lease into the past, so that nobody waits for it. */
  private async passLease(): Promise<void> {
    const { mobile, entries } = this.history
    await editClaim(this.system.stores.redis, claimKey(mobile), ({ until }) => ({ until: Math.min(until, 1) }))
    entries.push({ kind: 'the lease passes' })
  }

  private async arrive(sender: Client): Promise<Attempt> {
    const { action, presents, password, address } = sender
    const { app, requests } = this.system
    const send = action === 'sign up' ? apiClient(app).signUp : apiClient(app).resetPassword
    const body = { mobile: this.history.mobile, sms_code: codes[presents], password, password2: password }
    const attempt = await requests.start(sender, () => send(body, { from: address }))
    this.history.entries.push({ kind: 'arrival', attempt })
    this.logAnswer(attempt)
    return attempt
  }

  private async endStep(attempt: Attempt, step: Step, ending: Ending): Promise<void> {
    if (hasRun(ending)) this.history.entries.push({ kind: 'round trip', attempt, name: step.name })
    const late = await this.system.requests.end(attempt, step, ending)
    this.late.push(...late.map((lateStep) => ({ attempt, step: lateStep })))
    this.logAnswer(attempt)
  }

  private logAnswer({ client, reply }: Attempt): void {
    if (reply) this.log.push(`${client.name}: the answer is ${reply.statusCode} ${reply.json().errno}`)
  }
}
