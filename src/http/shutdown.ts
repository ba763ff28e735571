import type { IncomingMessage } from 'node:http'
import type { Socket } from 'node:net'
import fp from 'fastify-plugin'

interface Connections {
  /** Whether a request that this connection has sent whole is still to be answered. */
  isBusy(socket: Socket): boolean
  /** Whether a shutdown has been announced or has begun. */
  readonly closing: boolean
  /** Lets balancers know of the shutdown that is to come, while requests are still served. */
  announceClosing(): void
}

declare module 'fastify' {
  interface FastifyInstance {
    connections: Connections
  }
}

/** How long a request that is half here when the server closes has for its rest. */
const graceMs = 1_000

/** How often connections that have nothing more to say are looked for while the server closes. */
const checkMs = 25

/**
 * Ends the server well: what was accepted is finished and answered; a request that still comes in is refused in the
 * envelope; connections end as soon as they are idle, and at once if they never said anything.
 */
export const connections = fp(
  async (fastify) => {
    const { server } = fastify
    let announced = false
    let closing = false

    // Node's own closeIdleConnections() spares the silent, and stops its timeouts when the server closes.
    const requests = new Map<Socket, Set<IncomingMessage>>()
    server.on('connection', (socket: Socket) => {
      requests.set(socket, new Set())
      socket.once('close', () => requests.delete(socket))
    })
    server.on('request', (request, response) => {
      const open = requests.get(request.socket)?.add(request)
      response.once('close', () => open?.delete(request))
    })

    fastify.decorate('connections', {
      isBusy: (socket) => [...(requests.get(socket) ?? [])].some(({ complete }) => complete),
      get closing() {
        return announced || closing
      },
      announceClosing() {
        announced = true
      }
    } satisfies Connections)

    fastify.addHook('preClose', async () => {
      closing = true
      const graceEndsAt = Date.now() + graceMs
      function endIdle(): void {
        for (const [socket, open] of requests) {
          const awaited = [...open].some(({ complete }) => complete || Date.now() < graceEndsAt)
          if (!awaited) socket.destroy()
        }
      }
      endIdle()
      const interval = setInterval(endIdle, checkMs)
      server.once('close', () => clearInterval(interval))
    })

    fastify.addHook('onRequest', async (_request, reply) => {
      if (closing) return reply.outcome('busy')
    })
  },
  { fastify: '5.x', name: 'connections', dependencies: ['envelope'] }
)
