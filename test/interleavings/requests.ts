import { AsyncLocalStorage } from 'node:async_hooks'
import { setImmediate as endOfPass } from 'node:timers/promises'
import { hashSync, verifySync } from '@node-rs/argon2'
import type { FastifyInstance } from 'fastify'
import type { RedisStore } from '#src/stores/redis.js'
import { StoreUnavailable } from '#src/stores/store-unavailable.js'
import type { Reply } from '../../testkit/client.js'
import type { Attempt, Client } from './protocol.js'

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

/** A round trip to a store that a request waits for. */
export interface Step {
  name: string
  /** Runs it. Resolves also if it fails. */
  perform(): Promise<void>
  /** Gives its result, or its error, to the request. */
  answer(): void
  /** Gives an error to the request instead. */
  fail(error: Error): void
}

export const cheapHash = (password: string) => hashSync(password, { memoryCost: 8, timeCost: 1 })

/** The error that the service makes of a round trip without an answer. */
const timeout = () => new StoreUnavailable('redis', new Error('Command timed out'))

/** The passes of the event loop after which a request that does not wait for a step has ended. */
const passes = 6

export type RedisClient = Parameters<Parameters<RedisStore['run']>[0]>[0]

/** Stops the requests of an application before each step. The caller decides when a step goes on, and how it ends. */
export class Requests {
  private readonly current = new AsyncLocalStorage<Attempt>()
  /** Counts what happens, so that {@link settle} sees when nothing more does. */
  private events = 0

  constructor(app: FastifyInstance, redis: RedisClient) {
    const { redis: store, postgres, passwords } = app.mobileSignup
    const { run } = store
    store.run = (commands) => this.stop(nameOf(commands, redis), () => run(commands))
    const { query } = postgres
    Object.assign(postgres, {
      query: (...args: Parameters<typeof query>) => {
        const { name } = args[0]
        const isStale = name === 'find_user' && this.current.getStore()?.fault === 'reads from a former primary'
        return this.stop(`${name}`, async () => ({ ...(await query(...args)), ...(isStale && { rows: [] }) }))
      }
    })
    // A hash is no step: it changes nothing that others see, so its moment does not matter.
    passwords.hash = async (password) => {
      if (this.current.getStore()?.fault === 'fails to hash') throw new Error('no memory for a hash')
      return cheapHash(password)
    }
    passwords.verify = async (phc, password) => phc !== undefined && verifySync(phc, password)
  }

  /** Sends a request of a client. It runs until its first step. */
  async start(client: Client, send: () => Promise<Reply>): Promise<Attempt> {
    const fault = client.sent.length === 0 ? client.firstAttempt : undefined
    const attempt: Attempt = { client, fault, steps: [], isDead: false }
    client.sent.push(attempt)
    this.current.run(attempt, async () => {
      const reply = await send()
      this.events++
      if (!attempt.isDead) attempt.reply = reply
    })
    await this.settle()
    return attempt
  }

  /** Ends a step of a request. @returns the steps that the store may still run */
  async end(attempt: Attempt, step: Step, ending: Ending): Promise<readonly Step[]> {
    const { steps } = attempt
    attempt.isDead = ending.startsWith('the process dies')
    attempt.steps = attempt.isDead ? [] : steps.filter((other) => other !== step)
    if (hasRun(ending)) await step.perform()
    if (ending === 'done') step.answer()
    // Errors let the request of a dead process end, so that the application can be closed. It reaches no store any more.
    else for (const unanswered of attempt.isDead ? steps : [step]) unanswered.fail(timeout())
    await this.settle()
    if (ending === 'the process dies, and what it has sent is late') return steps
    const late = ending === 'the request is late' ? [step] : []
    if (attempt.reply === undefined) return late
    // The request has failed, and does not wait for what else it has sent.
    const others = attempt.steps
    attempt.steps = []
    for (const other of others) other.fail(timeout())
    return [...late, ...others]
  }

  /** Waits until the request that has gone on waits for a step, or has ended. */
  private async settle(): Promise<void> {
    let seen: number
    do {
      seen = this.events
      for (let pass = 0; pass < passes; pass++) await endOfPass()
    } while (this.events !== seen)
  }

  private stop<T>(name: string, run: () => Promise<T>): Promise<T> {
    const attempt = this.current.getStore()
    if (attempt === undefined) return run()
    this.events++
    if (attempt.isDead) return Promise.reject(timeout())
    return new Promise((resolve, reject) => {
      let result: Promise<T>
      const perform = async () => {
        result = run()
        await result.catch(() => undefined)
      }
      attempt.steps = [...attempt.steps, { name, perform, answer: () => resolve(result), fail: reject }]
    })
  }
}

/**
 * Returns the name of the first command that `commands` sends, for example `holdCode`, `release used` or `set session`: it gets a
 * client that sends nothing, and never answers.
 */
function nameOf(commands: (redis: RedisClient) => Promise<unknown>, redis: RedisClient): string {
  let name = ''
  const get = (_: unknown, command: string | symbol) => {
    return (...args: unknown[]) => {
      const plain = String(args[0]).startsWith('session:') ? `${String(command)} session` : String(command)
      name ||= command === 'releaseCode' ? `release ${args.at(-2)}` : plain
      return new Promise(() => undefined)
    }
  }
  commands(new Proxy<RedisClient>(redis, { get }))
  return name
}
