import { hash } from '@node-rs/argon2'
import fp from 'fastify-plugin'
import type { Config } from '../config.js'

interface Passwords {
  /**
   * Hashes a password with argon2id, off the event loop, after NFKC, so that one password typed on two keyboards
   * is one password (NIST SP 800-63B, 3.1.1.2).
   *
   * @returns a PHC string, `$argon2id$v=19$m=…,t=…,p=1$…`
   */
  hash(password: string): Promise<string>
}

declare module 'fastify' {
  interface FastifyInstance {
    passwords: Passwords
  }
}

export const passwords = fp<Pick<Config, 'hashMemoryKib' | 'hashPasses'>>(
  async (fastify, { hashMemoryKib, hashPasses }) => {
    // argon2id is the default algorithm of @node-rs/argon2. One lane: a hash is one thread's work.
    const parameters = { memoryCost: hashMemoryKib, timeCost: hashPasses, parallelism: 1 }

    fastify.decorate('passwords', {
      hash: (password) => hash(password.normalize('NFKC'), parameters)
    } satisfies Passwords)
  },
  { fastify: '5.x', name: 'passwords' }
)
