import fp from 'fastify-plugin'

interface Shutdown {
  /** Whether a shutdown has been announced or has begun. */
  readonly isAnnounced: boolean
  /**
   * Makes the readiness probe fail, so that balancers stop sending requests before the server closes, and replies close their
   * connections, so that few are open then.
   */
  announce(): void
}

declare module 'fastify' {
  interface FastifyInstance {
    shutdown: Shutdown
  }
}

/** How long a request that is on its way when the server closes may take to arrive completely. */
const arrivalGraceMs = 500

/** How often a closing server looks for connections without a request after that. */
const idleCheckMs = 25

/**
 * Graceful shutdown: accepted requests are answered, later ones on open connections are refused with `busy`, and connections
 * on which none arrives are closed.
 */
export const shutdown = fp(
  async (fastify) => {
    const { server, connections } = fastify
    let isAnnounced = false
    let isClosing = false

    function announce(): void {
      isAnnounced = true
      connections.closeAfterReplies()
    }
    fastify.decorate('shutdown', {
      get isAnnounced() {
        return isAnnounced
      },
      announce
    } satisfies Shutdown)

    fastify.addHook('preClose', async () => {
      isClosing = true
      announce()
      // Node's own would cut a request that is on its way, and leaves connections open that never had any.
      server.closeIdleConnections = () => undefined
      const graceEndsAt = performance.now() + arrivalGraceMs
      const interval = setInterval(() => {
        if (performance.now() < graceEndsAt) return
        for (const [socket, requests] of connections.unanswered) {
          if (![...requests.keys()].some(({ complete }) => complete)) socket.destroy()
        }
      }, idleCheckMs)
      server.once('close', () => clearInterval(interval))
    })

    fastify.addHook('onRequest', (_request, reply, done) => {
      if (isClosing) reply.outcome('busy')
      else done()
    })
  },
  { fastify: '5.x', name: 'shutdown', dependencies: ['replies', 'connections'] }
)
