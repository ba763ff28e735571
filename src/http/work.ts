import fp from 'fastify-plugin'
import { Unsettled } from './in-flight.js'

declare module 'fastify' {
  interface FastifyInstance {
    /**
     * Keeps the stores open until the work is settled, whatever becomes of the connection that asked for it.
     *
     * @returns the work
     */
    finish<T>(work: Promise<T>): Promise<T>
  }
}

/** Work that a shutdown waits for. The server itself waits for connections, and a client that has gone leaves none. */
export const work = fp(
  async (fastify) => {
    const unfinished = new Unsettled()
    fastify.decorate('finish', (work) => unfinished.add(work))
    // Before those that close the stores: Fastify takes these hooks from the last to the first.
    fastify.addHook('onClose', () => unfinished.none())
  },
  { fastify: '5.x', name: 'work', dependencies: ['postgres', 'redis', 'passwords'] }
)
