import { randomInt } from 'node:crypto'
import { findViolations } from './checks.js'
import type { Choices } from './choices.js'
import { type Client, code, codeKey, type History, newCode, send } from './history.js'
import { type Attempt, endings, hasRun, type Step } from './requests.js'
import type { Scenario } from './scenarios.js'
import type { System } from './system.js'

/** How often the lease may pass in one run. */
const leasesMax = 2

interface Option {
  /** Absent if no client acts. */
  sender?: Client
  text: string
  perform(): Promise<void>
}

let nextMobile = 13_000_000_000 + randomInt(1_000_000_000)

/**
 * Runs a scenario once, and compares the end with the guarantees.
 *
 * @param choices the default is that the client that went last goes on, or else the first that can, without a fault
 * @param faultsMax how many round trips may be lost, or processes die
 */
export async function runOnce(system: System, scenario: Scenario, choices: Choices, faultsMax: number) {
  const { requests, stores, clock } = system
  const mobile = `${nextMobile++}`
  await clock.reset()
  await stores.redis.set(codeKey(mobile), code, 'EX', 300)
  if (scenario.isRegistered) await system.register(mobile)

  const clients: Client[] = scenario.clients.map((spec) => ({ ...spec, sent: [] }))
  const { guesses = 5 } = scenario
  const history: History = { mobile, clients, log: [], claims: [], isCodeGone: false, guesses }
  const { log } = history
  const events = new Set(scenario.events)
  let faults = 0
  let leases = 0
  /** The requests that a store may still run. */
  const late: { sender: Client; step: Step }[] = []

  let lastClient: Client | undefined

  /** Returns what a client may do next: the usual first, then the faults. */
  function optionsOf(sender: Client): Option[] {
    const attempt = sender.sent.at(-1)
    if (attempt === undefined || (mayRetry(attempt) && sender.sent.length < sender.attempts)) {
      const arrive = async () => {
        if (scenario.isSlow) await clock.pass()
        const started = requests.start(() => send(system, history, sender))
        sender.sent.push(started)
        await requests.settle(started)
      }
      return [{ sender, text: `${sender.name}: the request arrives`, perform: arrive }]
    }
    const [step] = attempt.steps
    if (step === undefined) return []
    return endings.map((ending, index) => ({
      sender,
      text: `${sender.name}: ${step.name}${index === 0 ? '' : `, ${ending}`}`,
      async perform() {
        if (index > 0) faults++
        if (step.name === 'claimCode' && hasRun(ending)) history.claims.push(sender)
        const ended = await requests.end(attempt, ending)
        if (ending === 'the request is late') late.push({ sender, step: ended })
        if (attempt.reply)
          log.push(`${sender.name}: the answer is ${attempt.reply.statusCode} ${attempt.reply.json().errno}`)
      }
    }))
  }

  function eventOptions(): Option[] {
    const options: Option[] = []
    if (leases < leasesMax && history.claims.length > 0) {
      options.push({
        text: 'the lease passes',
        async perform() {
          leases++
          await clock.pass()
        }
      })
    }
    for (const request of late) {
      const { sender, step } = request
      options.push({
        text: `${sender.name}: the late ${step.name} runs`,
        async perform() {
          late.splice(late.indexOf(request), 1)
          if (step.name === 'claimCode') history.claims.push(sender)
          await step.perform()
        }
      })
    }
    for (const event of events) {
      options.push({
        text: event,
        async perform() {
          events.delete(event)
          history.isCodeGone = true
          if (event === 'the code expires') await stores.redis.del(codeKey(mobile))
          else await stores.redis.set(codeKey(mobile), newCode, 'EX', 300)
        }
      })
    }
    return options
  }

  for (;;) {
    const ofClients = clients.toSorted((a, b) => Number(b === lastClient) - Number(a === lastClient)).map(optionsOf)
    const usual = ofClients.flatMap(([first]) => first ?? [])
    if (usual.length === 0) break
    const faulty = faults < faultsMax ? ofClients.flatMap(([, ...others]) => others) : []
    const options = [...usual, ...faulty, ...eventOptions()]
    const chosen = options[choices.choose(options.length)]
    if (chosen === undefined) throw new Error('no such option')
    log.push(chosen.text)
    lastClient = chosen.sender ?? lastClient
    await chosen.perform()
  }
  // A request that waits for something else than a step would end the run before its orders have been tried.
  const unfinished = clients.filter(({ sent }) => sent.some(({ isDead, reply }) => !isDead && reply === undefined))
  if (unfinished.length > 0)
    throw new Error(`${unfinished.map(({ name }) => name)}: a request has neither step nor reply`)
  return { log, violations: await findViolations(system, history) }
}

/** A client sends its request again after a 5xx, or if the process has died with it. */
const mayRetry = ({ isDead, reply }: Attempt) => isDead || (reply !== undefined && reply.statusCode >= 500)
