import type { Socket } from 'node:net'
import fp from 'fastify-plugin'

/** How often connections that have become idle are looked for while the server closes. */
const idleCheckMs = 25

/**
 * What `close()` leaves open: a request that still comes in is refused in the envelope, and connections end as soon as
 * they are idle, or at once if they never said anything. Accepted requests are finished and answered.
 */
export const shutdown = fp(
  async (fastify) => {
    const { server } = fastify
    let closing = false

    // Node counts a connection as idle only after its first request.
    const silent = new Set<Socket>()
    server.on('connection', (socket) => {
      silent.add(socket)
      socket.once('close', () => silent.delete(socket))
    })
    server.on('request', ({ socket }) => silent.delete(socket))

    fastify.addHook('preClose', async () => {
      closing = true
      for (const socket of silent) socket.destroy()
      const interval = setInterval(() => server.closeIdleConnections(), idleCheckMs)
      server.once('close', () => clearInterval(interval))
    })

    fastify.addHook('onRequest', async (_request, reply) => {
      if (closing) return reply.outcome('busy')
    })
  },
  { fastify: '5.x', name: 'shutdown', dependencies: ['envelope'] }
)
