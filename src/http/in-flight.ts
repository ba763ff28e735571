import fp from 'fastify-plugin'

declare module 'fastify' {
  interface FastifyInstance {
    /** Requests whose work a shutdown finishes, also when their client has disconnected. */
    inFlight: InFlight
  }
}

/** Promises that must settle before something may be closed. */
export class InFlight {
  private readonly promises = new Set<Promise<unknown>>()

  /** @returns the promise */
  track<T>(promise: Promise<T>): Promise<T> {
    this.promises.add(promise)
    const remove = () => this.promises.delete(promise)
    promise.then(remove, remove)
    return promise
  }

  /** Resolves when all promises have settled, including those that are added meanwhile. Never rejects. */
  async drain(): Promise<void> {
    while (this.promises.size > 0) await Promise.allSettled(this.promises)
  }
}

/** Drains the tracked requests at shutdown. The server itself waits for connections only. */
export const inFlight = fp(
  async (fastify) => {
    const requests = new InFlight()
    fastify.decorate('inFlight', requests)
    fastify.addHook('onClose', () => requests.drain())
  },
  { fastify: '5.x', name: 'in-flight' }
)
