import fp from 'fastify-plugin'

interface Lifecycle {
  /** False while the server listens, but the start has more to do. Requests are refused with `busy`; probes are answered. */
  isStarted: boolean
  /** Whether a shutdown has been announced or has begun. */
  readonly isEnding: boolean
  /**
   * Makes the readiness probe fail, so that balancers stop sending requests before the server closes, and replies close their
   * connections, so that few are open then.
   */
  announceShutdown(): void
}

declare module 'fastify' {
  interface FastifyInstance {
    lifecycle: Lifecycle
  }
}

/** How long a request that is on its way when the server closes may take to arrive completely. */
const arrivalGraceMs = 500

/** How often a closing server looks for connections without a request after that. */
const idleCheckMs = 25

/**
 * Refuses requests but probes with `busy` before the start is complete, and after the shutdown has begun. A graceful shutdown: accepted
 * requests are answered, later ones on open connections are refused, and connections on which none arrives are closed.
 */
export const lifecycle = fp(
  async (fastify) => {
    const { server, connections } = fastify
    let isClosing = false
    const state = {
      isStarted: true,
      isEnding: false,
      announceShutdown() {
        state.isEnding = true
        connections.closeAfterReplies()
      }
    }
    fastify.decorate('lifecycle', state satisfies Lifecycle)

    fastify.addHook('preClose', async () => {
      isClosing = true
      state.announceShutdown()
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

    fastify.addHook('onRequest', (request, reply, done) => {
      const isRefused = (isClosing || !state.isStarted) && !request.routeOptions.config.isProbe
      if (isRefused) reply.outcome('busy')
      else done()
    })
  },
  { fastify: '5.x', name: 'lifecycle', dependencies: ['replies', 'connections'] }
)
