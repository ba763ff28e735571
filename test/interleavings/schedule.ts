import { randomInt } from 'node:crypto'
import { Checks } from './checks.js'
import type { Choices } from './choices.js'
import { type Client, codeKey, codes, type History, hasHappened, send } from './history.js'
import { type Attempt, type Ending, endings, hasRun, type Step } from './requests.js'
import type { Scenario, ScenarioEvent } from './scenarios.js'
import type { System } from './system.js'

/** How often the lease may pass in one run. */
const leasesMax = 2

/** Longer than the clock of a run moves: the end of a code is an event of its own. */
const codeLifeSeconds = 86_400

const [, ...faults] = endings

interface Option {
  /** Absent if no client acts. */
  sender?: Client
  text: string
  perform(): Promise<void>
}

/** A request that a store may still run. */
interface LateStep {
  sender: Client
  attempt: Attempt
  step: Step
  ending: Ending
}

let nextMobile = 13_000_000_000 + randomInt(1_000_000_000)

/**
 * Runs a scenario once, and compares the end with the guarantees.
 *
 * @param choices the default is that the client that went last goes on, or else the first that can, without a fault
 * @param faultsMax how many round trips may be lost, or processes die
 */
export async function runOnce(system: System, scenario: Scenario, choices: Choices, faultsMax: number) {
  const mobile = `${nextMobile++}`
  await system.clock.reset()
  await system.stores.redis.set(codeKey(mobile), codes['the code'], 'EX', codeLifeSeconds)
  if (scenario.isRegistered) await system.register(mobile)
  return new Run(system, scenario, choices, faultsMax, mobile).play()
}

class Run {
  private readonly history: History
  private readonly checks: Checks
  private readonly late: LateStep[] = []
  private faults = 0
  private leases = 0
  private lastClient: Client | undefined
  /** The code that was issued, until it is withdrawn. */
  private issuedCode: string | undefined

  constructor(
    private readonly system: System,
    private readonly scenario: Scenario,
    private readonly choices: Choices,
    private readonly faultsMax: number,
    mobile: string
  ) {
    const { clients, guesses = 5, isRegistered: wasRegistered = false } = scenario
    this.history = {
      mobile,
      wasRegistered,
      clients: clients.map((spec) => ({ ...spec, sent: [] })),
      log: [],
      entries: [],
      guesses
    }
    this.checks = new Checks(system, this.history)
  }

  async play() {
    await this.answerAll()
    await this.checks.checkUsedCodes()
    const mayHoldCode = this.late.length > 0
    await this.retryAll()
    // A late claim may have held the code while the clients retried.
    if (mayHoldCode) await this.retryAll()
    await this.checks.checkEnd()
    return { log: this.history.log, violations: this.checks.violations }
  }

  /** Makes choices until every client has its answer, and nothing else is chosen to happen. */
  private async answerAll(): Promise<void> {
    let isOver = false
    const end: Option = {
      text: 'all clients have their answers',
      perform: async () => {
        isOver = true
      }
    }
    while (!isOver) {
      const clients = this.clientsByTurn()
      const usual = clients.flatMap((client) => this.usualOption(client) ?? [])
      const events = [...this.lateOptions(), ...this.eventOptions()]
      const withdrawal = this.withdrawalOptions()
      if (usual.length === 0) await this.choose([...(withdrawal.length > 0 ? withdrawal : [end]), ...events])
      else {
        const others = clients.flatMap((client) => [...this.swapOptions(client), ...this.faultOptions(client)])
        await this.choose([...usual, ...others, ...this.leaseOptions(), ...withdrawal, ...events])
      }
    }
    // A request that waits for something else than a step would end the run before its orders have been tried.
    const isUnfinished = ({ isDead, reply }: Attempt) => !isDead && reply === undefined
    const unfinished = this.history.clients.find(({ sent }) => sent.some(isUnfinished))
    if (unfinished) throw new Error(`a request of ${unfinished.name} has neither step nor reply`)
  }

  /**
   * The leases of all claims pass. Then each client that has a code sends its request once more, without a fault. Late requests
   * may run before and between, and the others run after that.
   */
  private async retryAll(): Promise<void> {
    await this.system.clock.pass()
    this.history.entries.push({ kind: 'all leases have passed' })
    for (const sender of this.history.clients.filter((client) => client.sent.length > 0)) {
      if (sender.presents === 'a wrong code') continue
      let hasRetried = false
      const retry: Option = {
        sender,
        text: `${sender.name}: after all leases, the request arrives once more`,
        perform: async () => {
          hasRetried = true
          await this.checks.checkRetry(sender, () => this.sendWithoutFault(sender))
        }
      }
      while (!hasRetried) await this.choose([retry, ...this.lateOptions()])
    }
    while (this.late.length > 0) await this.choose(this.lateOptions())
  }

  private async choose(options: readonly Option[]): Promise<void> {
    const chosen = options[this.choices.choose(options.length)]
    if (chosen === undefined) throw new Error('no such option')
    this.history.log.push(chosen.text)
    this.lastClient = chosen.sender ?? this.lastClient
    await chosen.perform()
  }

  /** Returns the client that went last, then the others. */
  private clientsByTurn(): readonly Client[] {
    const { clients } = this.history
    const { lastClient } = this
    return lastClient ? [lastClient, ...clients.filter((client) => client !== lastClient)] : clients
  }

  /** Returns what a client does next if nothing goes wrong. */
  private usualOption(sender: Client): Option | undefined {
    const attempt = sender.sent.at(-1)
    if (attempt === undefined || (mayRetry(attempt) && sender.sent.length < sender.attempts)) {
      if (sender.presents === 'the new code' && !hasHappened(this.history, 'a new code is sent')) return undefined
      const perform = async () => {
        if (this.scenario.isSlow) await this.system.clock.pass()
        await this.arrive(sender)
      }
      const text = `${sender.name}: the request arrives${failsNext(sender) ? ', and its hash will fail' : ''}`
      return { sender, text, perform }
    }
    const [step] = attempt.steps
    return step && this.stepOption(sender, attempt, step, 'done')
  }

  /** Round trips that a request has sent together may run in any order. */
  private swapOptions(sender: Client): Option[] {
    const attempt = sender.sent.at(-1)
    return attempt?.steps.slice(1).map((step) => this.stepOption(sender, attempt, step, 'done')) ?? []
  }

  private faultOptions(sender: Client): Option[] {
    const attempt = sender.sent.at(-1)
    const [step] = attempt?.steps ?? []
    if (attempt === undefined || step === undefined || this.faults === this.faultsMax) return []
    return faults.map((ending) => this.stepOption(sender, attempt, step, ending))
  }

  private stepOption(sender: Client, attempt: Attempt, step: Step, ending: Ending): Option {
    return {
      sender,
      text: `${sender.name}: ${step.name}${ending === 'done' ? '' : `, ${ending}`}`,
      perform: async () => {
        if (ending !== 'done') this.faults++
        await this.endStep(sender, attempt, step, ending)
      }
    }
  }

  private leaseOptions(): Option[] {
    const hasClaim = this.history.entries.some((entry) => entry.kind === 'round trip' && entry.name === 'claimCode')
    if (this.leases === leasesMax || !hasClaim) return []
    const perform = async () => {
      this.leases++
      await this.system.clock.pass()
    }
    return [{ text: 'the lease passes', perform }]
  }

  private lateOptions(): Option[] {
    return this.late.map((lateStep) => {
      const { sender, attempt, step, ending } = lateStep
      return {
        text: `${sender.name}: the late ${step.name} runs`,
        perform: async () => {
          this.late.splice(this.late.indexOf(lateStep), 1)
          this.history.entries.push({ kind: 'round trip', client: sender, attempt, name: step.name, ending })
          await step.perform()
        }
      }
    })
  }

  private eventOptions(): Option[] {
    const events = this.scenario.events?.filter((event) => !hasHappened(this.history, event)) ?? []
    return events.map((event) => ({ text: event, perform: () => this.happen(event) }))
  }

  private async happen(event: ScenarioEvent): Promise<void> {
    const { app, stores } = this.system
    const { mobile, entries } = this.history
    entries.push({ kind: 'event', event })
    if (event === 'the code expires') await stores.redis.del(codeKey(mobile))
    else if (event === 'a new code is sent')
      await stores.redis.set(codeKey(mobile), codes['the new code'], 'EX', codeLifeSeconds)
    else this.issuedCode = (await app.codes.issue(mobile, undefined, '192.0.2.9')).code
  }

  private withdrawalOptions(): Option[] {
    const { issuedCode } = this
    const { mobile, entries } = this.history
    if (issuedCode === undefined) return []
    const event = 'the issued code is withdrawn'
    const perform = async () => {
      this.issuedCode = undefined
      entries.push({ kind: 'event', event })
      await this.system.app.codes.withdraw(mobile, issuedCode)
    }
    return [{ text: event, perform }]
  }

  private async arrive(sender: Client): Promise<Attempt> {
    const { system, history } = this
    const attempt = await system.requests.start(() => send(system, history, sender), failsNext(sender))
    sender.sent.push(attempt)
    this.history.entries.push({ kind: 'arrival', client: sender, attempt })
    this.recordAnswer(sender, attempt)
    return attempt
  }

  private async endStep(sender: Client, attempt: Attempt, step: Step, ending: Ending): Promise<void> {
    if (hasRun(ending)) {
      this.history.entries.push({ kind: 'round trip', client: sender, attempt, name: step.name, ending })
    }
    const lateSteps = await this.system.requests.end(attempt, step, ending)
    this.late.push(...lateSteps.map((lateStep) => ({ sender, attempt, step: lateStep, ending })))
    this.recordAnswer(sender, attempt)
  }

  private recordAnswer(client: Client, attempt: Attempt): void {
    const { reply } = attempt
    if (reply === undefined) return
    this.history.entries.push({ kind: 'answer', client, attempt, reply })
    this.history.log.push(`${client.name}: the answer is ${reply.statusCode} ${reply.json().errno}`)
  }

  private async sendWithoutFault(sender: Client): Promise<void> {
    const attempt = await this.arrive(sender)
    for (let [step] = attempt.steps; step !== undefined; [step] = attempt.steps) {
      await this.endStep(sender, attempt, step, 'done')
    }
    if (attempt.reply === undefined) throw new Error(`a request of ${sender.name} has neither step nor reply`)
  }
}

/** Whether the hash of the next attempt fails. */
const failsNext = ({ failsFirst = false, sent }: Client) => failsFirst && sent.length === 0

/** A client sends its request again after a 5xx, or if the process has died with it. */
const mayRetry = ({ isDead, reply }: Attempt) => isDead || (reply !== undefined && reply.statusCode >= 500)
