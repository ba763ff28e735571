import { randomUUID } from 'node:crypto'
import type { Writable } from 'node:stream'
import { hash, verify as verifyArgon2 } from '@node-rs/argon2'
import type { FastifyInstance } from 'fastify'
import type { Config } from '../config/config.js'
import type { Observer } from '../telemetry/observer.js'
import { HashQueue } from './hash-queue.js'
import { verifierOf } from './stored-hash.js'

/** @throws if no password can be hashed with the configured parameters */
export async function createPasswords(
  fastify: FastifyInstance,
  { hashMemoryKib, hashPasses, hashThreads, poolThreads, hashMaxWaitMs }: Config,
  observer: Observer | undefined
) {
  // argon2id is the default algorithm of @node-rs/argon2. One lane, so a hash is the work of one thread.
  const parameters = { memoryCost: hashMemoryKib, timeCost: hashPasses, parallelism: 1 }
  // If libuv's pool has a thread for each hash and no other, it gets one job more than it has threads, so that no thread
  // sleeps between two hashes until the event loop gives it the next. In a larger pool, that job would run at once.
  const spareJobs = poolThreads === hashThreads ? 1 : 0
  const queue = new HashQueue(hashThreads + spareJobs, hashMaxWaitMs)
  fastify.addHook('onClose', () => queue.close())
  // An answered request needs no place. Not at 'close' of the response: on Node.js 20 a pipelined response whose connection
  // has died before its turn never emits it, and would keep its place for ever.
  fastify.addHook('onSend', (_request, reply, _payload, done) => {
    queue.release(reply.raw)
    done()
  })

  /**
   * A hash of a random password. A login of an unknown user verifies it, so that it takes as long as any other. It is also
   * the first job, by which the queue knows how long one takes.
   */
  const decoyPhc = await queue.run(() => hash(randomUUID(), parameters))
  async function matchesNothing(password: string): Promise<boolean> {
    await verifyArgon2(decoyPhc, password)
    return false
  }
  // The hash of the start is not observed.
  queue.onJob = observer?.onHash.bind(observer)
  /** `$argon2id$v=19$m=…,t=…,p=1$`: what all hashes with the configured parameters begin with. */
  const phcPrefix = decoyPhc.slice(0, decoyPhc.indexOf('$', '$argon2id$v=19$'.length) + 1)

  return {
    /** Admit a request before it touches a store. It counts as queued until it joins the queue or is answered. */
    queue,
    /**
     * Hashes a password with argon2id, off the event loop. NFKC first, so that one password typed on two keyboards is one
     * password (NIST SP 800-63B, section 3.1.1.2).
     *
     * @param response removes the job from the queue if it closes before the job has started: the `raw` of a reply
     * @returns a PHC string, `$argon2id$v=19$m=…,t=…,p=1$…`
     * @throws {ClientDisconnected}
     */
    hash: (password: string, response?: Writable) =>
      queue.run(() => hash(password.normalize('NFKC'), parameters), response),
    /**
     * Verifies a password against a stored hash, in the same queue as the hashes: as typed, which is what other systems have hashed,
     * then its NFKC form.
     *
     * @param storedHash undefined for an unknown user. Without a verifier for it, the answer is false and takes as long as for a hash
     * of this service.
     */
    async verify(storedHash: string | undefined, password: string, response: Writable): Promise<boolean> {
      const matchesHash = (storedHash === undefined ? undefined : verifierOf(storedHash)) ?? matchesNothing
      async function matches(): Promise<boolean> {
        for (const candidate of new Set([password, password.normalize('NFKC')])) {
          if (await matchesHash(candidate)) return true
        }
        return false
      }
      return queue.run(matches, response)
    },
    /** Whether a PHC string has other parameters than the configured ones. */
    isOutdated: (phc: string) => !phc.startsWith(phcPrefix)
  }
}
