import type { IncomingMessage, ServerResponse } from 'node:http'
import type { Socket } from 'node:net'
import fp from 'fastify-plugin'

interface Shutdown {
  /** Whether a shutdown has been announced or has begun. */
  readonly isAnnounced: boolean
  /** Makes the readiness probe fail, so that balancers stop sending requests before the server closes. */
  announce(): void
  /** Waits until every request that has arrived completely on this connection is answered. */
  untilAnswered(socket: Socket): Promise<void>
}

declare module 'fastify' {
  interface FastifyInstance {
    shutdown: Shutdown
  }
}

/** How long a request that has arrived partly when the server closes may take to arrive completely. */
const partialRequestGraceMs = 1_000

/** How often a closing server looks for idle connections. */
const idleCheckMs = 25

/**
 * Graceful shutdown: accepted requests are answered, later ones on open connections are refused with `busy`, and idle
 * connections are closed at once.
 */
export const shutdown = fp(
  async (fastify) => {
    const { server } = fastify
    let isAnnounced = false
    let isClosing = false

    // Node's closeIdleConnections() does not close connections without any request, and a closing server's timeouts
    // stop.
    const openRequests = new Map<Socket, Map<IncomingMessage, ServerResponse>>()
    server.on('connection', (socket: Socket) => {
      openRequests.set(socket, new Map())
      socket.once('close', () => openRequests.delete(socket))
    })
    server.on('request', (request, response) => {
      const requests = openRequests.get(request.socket)?.set(request, response)
      response.once('close', () => requests?.delete(request))
    })

    fastify.decorate('shutdown', {
      get isAnnounced() {
        return isAnnounced || isClosing
      },
      announce() {
        isAnnounced = true
      },
      async untilAnswered(socket) {
        for (const [request, response] of openRequests.get(socket) ?? []) {
          if (request.complete) await new Promise((resolve) => response.once('close', resolve))
        }
      }
    } satisfies Shutdown)

    fastify.addHook('preClose', async () => {
      isClosing = true
      const graceEndsAt = Date.now() + partialRequestGraceMs
      function closeIdleConnections(): void {
        for (const [socket, requests] of openRequests) {
          const isInUse = [...requests.keys()].some(({ complete }) => complete || Date.now() < graceEndsAt)
          if (!isInUse) socket.destroy()
        }
      }
      closeIdleConnections()
      const interval = setInterval(closeIdleConnections, idleCheckMs)
      server.once('close', () => clearInterval(interval))
    })

    fastify.addHook('onRequest', (_request, reply, done) => {
      if (isClosing) reply.outcome('busy')
      else done()
    })
  },
  { fastify: '5.x', name: 'shutdown', dependencies: ['replies'] }
)
