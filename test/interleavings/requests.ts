import { AsyncLocalStorage } from 'node:async_hooks'
import { setImmediate as endOfPass } from 'node:timers/promises'
import type { FastifyInstance } from 'fastify'
import type { Reply } from '../../testkit/client.js'

/**
 * What may happen to a round trip. After a lost reply or request the service has waited for its timeout. A late request is
 * one that the store runs after that. A process that dies takes its request with it.
 */
export const endings = [
  'done',
  'the reply is lost',
  'the request is lost',
  'the request is late',
  'the process dies before',
  'the process dies after'
] as const

export type Ending = (typeof endings)[number]

/** A round trip to a store, or a hash, that a request waits for. */
export interface Step {
  name: string
  /** A hash changes nothing that others see, so its moment does not matter. */
  isLocal: boolean
  /** Runs it. Resolves also if it fails. */
  perform(): Promise<void>
  /** Gives its result, or its error, to the request. */
  answer(): void
  /** Gives an error to the request instead. */
  fail(error: Error): void
}

/** One request, from its arrival to its reply, or to the death of its process. */
export class Attempt {
  readonly steps: Step[] = []
  reply: Reply | undefined
  isDead = false
}

/** The passes of the event loop after which a request that does not wait for a step has ended. */
const passes = 6

/** Stops the requests of an application before each step. The caller decides when a step goes on, and how it ends. */
export class Requests {
  private readonly current = new AsyncLocalStorage<Attempt>()
  /** Counts what happens, so that {@link settle} sees when nothing more does. */
  private events = 0

  /** @param lostReply the error that the service makes of a round trip without an answer */
  constructor(
    app: FastifyInstance,
    private readonly lostReply: () => Error
  ) {
    const { withRedis, postgres, passwords } = app
    const { query } = postgres
    const { hash, verify } = passwords
    Object.defineProperty(app, 'withRedis', {
      value: <T>(run: Parameters<typeof withRedis<T>>[0]) => this.hold(commandOf(run), false, () => withRedis(run))
    })
    Object.assign(postgres, {
      query: (...args: Parameters<typeof query>) => this.hold(String(args[0].name), false, () => query(...args))
    })
    passwords.hash = (password) => this.hold('hash', true, () => hash(password))
    passwords.verify = (phc, password, client) => this.hold('verify', true, () => verify(phc, password, client))
  }

  /** Sends a request. It runs until its first step. */
  start(send: () => Promise<Reply>): Attempt {
    const attempt = new Attempt()
    this.current.run(attempt, () => {
      send().then((reply) => {
        this.events++
        if (!attempt.isDead) attempt.reply = reply
      })
    })
    return attempt
  }

  /** Ends the first step of a request. @returns the step */
  async end(attempt: Attempt, ending: Ending): Promise<Step> {
    const step = attempt.steps.shift()
    if (step === undefined) throw new Error('the request waits for no step')
    if (hasRun(ending)) await step.perform()
    if (ending === 'the process dies before' || ending === 'the process dies after') {
      attempt.isDead = true
      attempt.steps.length = 0
    } else if (ending === 'done') step.answer()
    else step.fail(this.lostReply())
    await this.settle(attempt)
    return step
  }

  /** Waits until a request waits for a step that others see, or has ended. */
  async settle(attempt: Attempt): Promise<void> {
    let seen: number
    do {
      seen = this.events
      for (let pass = 0; pass < passes; pass++) await endOfPass()
      if (attempt.steps[0]?.isLocal) await this.end(attempt, 'done')
    } while (this.events !== seen)
  }

  private hold<T>(name: string, isLocal: boolean, run: () => Promise<T>): Promise<T> {
    const attempt = this.current.getStore()
    if (attempt === undefined) return run()
    this.events++
    return new Promise((resolve, reject) => {
      let result: Promise<T>
      const perform = async () => {
        result = run()
        await result.catch(() => undefined)
      }
      if (!attempt.isDead) attempt.steps.push({ name, isLocal, perform, answer: () => resolve(result), fail: reject })
    })
  }
}

const notRun: readonly Ending[] = ['the request is lost', 'the request is late', 'the process dies before']

/** Whether the store has run the request. */
export const hasRun = (ending: Ending) => !notRun.includes(ending)

/** Returns the name of the command that a function sends to Redis. */
const commandOf = (run: object) => /redis\.(\w+)/.exec(String(run))?.[1] ?? 'Redis'
