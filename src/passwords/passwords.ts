import { randomUUID } from 'node:crypto'
import type { Writable } from 'node:stream'
import fp from 'fastify-plugin'
import type { Config } from '../config/config.js'
import { HashPool } from './hash-pool.js'

interface Passwords {
  /**
   * Admission, to be asked before a code is touched: undefined, or how many seconds from now there will be room in the
   * queue. A look, not a hold: what is refused later, as a wrong code is, has never taken anybody's place.
   */
  retryAfterSeconds(): number | undefined
  /**
   * Hashes a password with argon2id, off the event loop, after NFKC, so that one password typed on two keyboards
   * is one password (NIST SP 800-63B, 3.1.1.2).
   *
   * @param client takes the work out of the queue, if it still waits there, when it closes: a reply's `raw`
   * @throws {ClientGone}
   * @returns a PHC string, `$argon2id$v=19$m=…,t=…,p=1$…`
   */
  hash(password: string, client?: Writable): Promise<string>
  /**
   * Whether a password is that of a PHC string; in the same queue as the hashes.
   *
   * @param phc undefined where there is none: false, after the time that it takes with one
   */
  verify(phc: string | undefined, password: string, client: Writable): Promise<boolean>
  /** Passwords that wait for a thread. */
  readonly queueLength: number
  /** How long one would wait that came now. */
  readonly expectedWaitMs: number
  /** Whether a PHC string was made with other parameters than are configured. */
  isOutdated(phc: string): boolean
}

declare module 'fastify' {
  interface FastifyInstance {
    passwords: Passwords
  }
}

export const passwords = fp<Pick<Config, 'hashMemoryKib' | 'hashPasses' | 'hashThreads' | 'hashMaxWaitMs'>>(
  async (fastify, { hashMemoryKib, hashPasses, hashThreads, hashMaxWaitMs }) => {
    // argon2id is the default algorithm of @node-rs/argon2. One lane: a hash is one thread's work.
    const pool = new HashPool(
      hashThreads,
      { memoryCost: hashMemoryKib, timeCost: hashPasses, parallelism: 1 },
      (waitMs, hashMs) => fastify.metrics?.observeHash(waitMs, hashMs)
    )
    fastify.addHook('onClose', () => pool.close())
    await pool.ready()
    const nobodys = await pool.hash(randomUUID())
    const parameters = nobodys.slice(0, nobodys.indexOf('$', '$argon2id$v=19$'.length) + 1)

    fastify.decorate('passwords', {
      retryAfterSeconds() {
        const excessMs = pool.expectedWaitMs - hashMaxWaitMs
        return excessMs > 0 ? Math.ceil(excessMs / 1_000) : undefined
      },
      hash: (password, client) => pool.hash(password.normalize('NFKC'), client),
      async verify(phc, password, client) {
        const matches = await pool.verify(phc ?? nobodys, password.normalize('NFKC'), client)
        return matches && phc !== undefined
      },
      get queueLength() {
        return pool.queueLength
      },
      get expectedWaitMs() {
        return pool.expectedWaitMs
      },
      isOutdated: (phc) => !phc.startsWith(parameters)
    } satisfies Passwords)
  },
  { fastify: '5.x', name: 'passwords' }
)
