import type { Writable } from 'node:stream'
import fp from 'fastify-plugin'
import type { Config } from '../config.js'
import { HashPool } from '../hash-pool.js'

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
  hash(password: string, client: Writable): Promise<string>
  /** Whether a password is that of a PHC string; in the same queue as the hashes. */
  verify(phc: string, password: string, client: Writable): Promise<boolean>
}

declare module 'fastify' {
  interface FastifyInstance {
    passwords: Passwords
  }
}

export const passwords = fp<Pick<Config, 'hashMemoryKib' | 'hashPasses' | 'hashThreads' | 'hashMaxWaitMs'>>(
  async (fastify, { hashMemoryKib, hashPasses, hashThreads, hashMaxWaitMs }) => {
    // argon2id is the default algorithm of @node-rs/argon2. One lane: a hash is one thread's work.
    const pool = new HashPool(hashThreads, { memoryCost: hashMemoryKib, timeCost: hashPasses, parallelism: 1 })
    fastify.addHook('onClose', () => pool.close())
    await pool.ready()

    fastify.decorate('passwords', {
      retryAfterSeconds() {
        const excessMs = pool.expectedWaitMs - hashMaxWaitMs
        return excessMs > 0 ? Math.ceil(excessMs / 1_000) : undefined
      },
      hash: (password, client) => pool.hash(password.normalize('NFKC'), client),
      verify: (phc, password, client) => pool.verify(phc, password.normalize('NFKC'), client)
    } satisfies Passwords)
  },
  { fastify: '5.x', name: 'passwords' }
)
