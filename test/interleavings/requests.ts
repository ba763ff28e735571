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
  'the process dies after',
  'the process dies, and what it has sent is late'
] as const

export type Ending = (typeof endings)[number]

/** Whether the store has run the request. */
export const hasRun = (ending: Ending) => ['done', 'the reply is lost', 'the process dies after'].includes(ending)

const isDeath = (ending: Ending) => ending.startsWith('the process dies')

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
  /** What the request has sent, and waits for, in this order. */
  steps: readonly Step[] = []
  reply: Reply | undefined
  isDead = false

  constructor(readonly failsToHash: boolean) {}
}

/** The passes of the event loop after which a request that does not wait for a step has ended. */
const passes = 6

/** Stops the requests of an application before each step. The caller decides when a step goes on, and how it ends. */
export class Requests {
  private readonly current = new AsyncLocalStorage<Attempt>()
  /** Counts what happens, so that {@link settle} sees when nothing more does. */
  private events = 0
  /** An error in here that the service has caught as if a store had failed. */
  private error: Error | undefined

  /** @param lostReply the error that the service makes of a round trip without an answer */
  constructor(
    app: FastifyInstance,
    private readonly lostReply: () => Error
  ) {
    const { withRedis, postgres, passwords } = app
    const { query } = postgres
    const { hash, verify } = passwords
    Object.defineProperty(app, 'withRedis', {
      value: <T>(run: Parameters<typeof withRedis<T>>[0]) => this.hold(this.commandOf(run), false, () => withRedis(run))
    })
    Object.assign(postgres, {
      query: (...args: Parameters<typeof query>) => this.hold(String(args[0].name), false, () => query(...args))
    })
    passwords.hash = (password) => {
      const fail = () => Promise.reject(new Error('no memory for a hash'))
      return this.hold('hash', true, this.current.getStore()?.failsToHash ? fail : () => hash(password))
    }
    passwords.verify = (phc, password, client) => this.hold('verify', true, () => verify(phc, password, client))
  }

  /** Sends a request. It runs until its first step. */
  async start(send: () => Promise<Reply>, failsToHash: boolean): Promise<Attempt> {
    const attempt = new Attempt(failsToHash)
    this.current.run(attempt, () => {
      send().then((reply) => {
        this.events++
        if (!attempt.isDead) attempt.reply = reply
      })
    })
    await this.settle(attempt)
    return attempt
  }

  /**
   * Ends a step of a request.
   *
   * @returns the steps that the store may still run
   */
  async end(attempt: Attempt, step: Step, ending: Ending): Promise<readonly Step[]> {
    const sent = attempt.steps
    if (!sent.includes(step)) throw new Error(`the request does not wait for ${step.name}`)
    attempt.steps = sent.filter((other) => other !== step)
    if (hasRun(ending)) await step.perform()
    if (isDeath(ending)) {
      // Errors let the request end, so that the application can be closed. It reaches no store any more, and nobody gets its reply.
      attempt.isDead = true
      attempt.steps = []
      for (const unanswered of sent) unanswered.fail(this.lostReply())
    } else if (ending === 'done') step.answer()
    else step.fail(this.lostReply())
    await this.settle(attempt)
    if (ending === 'the process dies, and what it has sent is late') return sent
    return ending === 'the request is late' ? [step] : []
  }

  /** Waits until a request waits for a step that others see, or has ended. */
  private async settle(attempt: Attempt): Promise<void> {
    let seen: number
    do {
      seen = this.events
      for (let pass = 0; pass < passes; pass++) await endOfPass()
      const local = attempt.steps.find(({ isLocal }) => isLocal)
      if (local !== undefined) await this.end(attempt, local, 'done')
    } while (this.events !== seen)
    if (this.error !== undefined) throw this.error
  }

  private hold<T>(name: string, isLocal: boolean, run: () => Promise<T>): Promise<T> {
    const attempt = this.current.getStore()
    if (attempt === undefined) return run()
    this.events++
    if (attempt.isDead) return Promise.reject(this.lostReply())
    return new Promise((resolve, reject) => {
      let result: Promise<T>
      const perform = async () => {
        result = run()
        await result.catch(() => undefined)
      }
      const step = { name, isLocal, perform, answer: () => resolve(result), fail: reject }
      attempt.steps = [...attempt.steps, step]
    })
  }

  /** Returns the name of the command that a function sends to Redis. */
  private commandOf(run: object): string {
    const command = /\bredis\.(\w+)/.exec(String(run))?.[1]
    if (command !== undefined) return command
    this.error = new Error(`no command of Redis is found in ${run}`)
    throw this.error
  }
}
