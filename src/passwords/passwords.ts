import { randomUUID } from 'node:crypto'
import type { Writable } from 'node:stream'
import fp from 'fastify-plugin'
import type { Config } from '../config/config.js'
import type { Observer } from '../telemetry/observer.js'
import { EventCoalescing } from './event-coalescing.js'
import { HashPool, longestRestartPauseMs } from './hash-pool.js'
import { areHugePagesOff, hugePagesAdvice } from './huge-pages.js'

interface Passwords {
  /**
   * Admission, to be checked before a code is touched. It reserves nothing: requests that are refused later, for example
   * for a wrong code, never take the place of others.
   *
   * @returns 0 if the expected wait for a thread is within `HASH_MAX_WAIT_MS`, else the seconds until it may be
   */
  admissionDelaySeconds(): number
  /**
   * Hashes a password with argon2id, off the event loop. NFKC first, so that one password typed on two keyboards is one
   * password (NIST SP 800-63B, section 3.1.1.2).
   *
   * @param client removes the job from the queue if it closes before a thread has the job in hand: the `raw` of a reply
   * @returns a PHC string, `$argon2id$v=19$m=…,t=…,p=1$…`
   * @throws {ClientDisconnected}
   */
  hash(password: string, client?: Writable): Promise<string>
  /**
   * Verifies a password against a PHC string, in the same queue as the hashes.
   *
   * @param phc undefined for an unknown user: the answer is false and takes as long as for a known one
   */
  verify(phc: string | undefined, password: string, client: Writable): Promise<boolean>
  /** The number of passwords that wait for a thread. */
  readonly queueLength: number
  /** How long a new password would wait for a thread. */
  readonly expectedWaitMs: number
  /** False while no thread can start. */
  readonly isAvailable: boolean
  /** Whether a PHC string has other parameters than the configured ones. */
  isOutdated(phc: string): boolean
}

declare module 'fastify' {
  interface FastifyInstance {
    passwords: Passwords
  }
}

interface PasswordsOptions {
  config: Config
  observer?: Observer | undefined
  /** Whether the event loop may sleep while hashes are queued. Everything else that runs in this process waits, too. */
  coalesceEvents?: boolean
}

export const passwords = fp<PasswordsOptions>(
  async (fastify, { config, observer, coalesceEvents }) => {
    const { hashMemoryKib, hashPasses, hashThreads, hashMaxWaitMs, storeTimeoutMs } = config
    // argon2id is the default algorithm of @node-rs/argon2. One lane, so a hash is the work of one thread.
    const parameters = { memoryCost: hashMemoryKib, timeCost: hashPasses, parallelism: 1 }
    const pool = new HashPool(hashThreads, parameters)
    pool.onThreadError = (err) => fastify.log.error({ err }, 'a hash thread failed')
    fastify.addHook('onClose', () => pool.close())
    await pool.ready()
    if (await areHugePagesOff()) fastify.log.warn(hugePagesAdvice)
    /** A hash of a random password. A login of an unknown user verifies it, so that it takes as long as any other. */
    const decoyPhc = await pool.hash(randomUUID())
    // Hashes of the start are not observed.
    pool.onJob = observer?.onHash.bind(observer)
    if (coalesceEvents) {
      const coalescing = new EventCoalescing(() => pool.slackMs, storeTimeoutMs)
      pool.onBacklog = () => coalescing.start()
    }
    /** `$argon2id$v=19$m=…,t=…,p=1$`: what all hashes with the configured parameters begin with. */
    const phcPrefix = decoyPhc.slice(0, decoyPhc.indexOf('$', '$argon2id$v=19$'.length) + 1)

    fastify.decorate('passwords', {
      admissionDelaySeconds() {
        const delayMs = pool.isAvailable ? Math.max(0, pool.expectedWaitMs - hashMaxWaitMs) : longestRestartPauseMs
        return Math.ceil(delayMs / 1_000)
      },
      hash: (password, client) => pool.hash(password.normalize('NFKC'), client),
      async verify(phc, password, client) {
        const matches = await pool.verify(phc ?? decoyPhc, password.normalize('NFKC'), client)
        return matches && phc !== undefined
      },
      get isAvailable() {
        return pool.isAvailable
      },
      get queueLength() {
        return pool.queueLength
      },
      get expectedWaitMs() {
        return pool.expectedWaitMs
      },
      isOutdated: (phc) => !phc.startsWith(phcPrefix)
    } satisfies Passwords)
  },
  { fastify: '5.x', name: 'passwords' }
)
