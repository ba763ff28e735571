import fp from 'fastify-plugin'

declare module 'fastify' {
  interface FastifyInstance {
    startUp: {
      /** False while the server listens, but the start has more to do. Requests are refused with `busy`; probes are answered. */
      isComplete: boolean
    }
  }
}

/** Lets a server answer probes before its start is complete. */
export const startUp = fp(
  async (fastify) => {
    fastify.decorate('startUp', { isComplete: true })
    fastify.addHook('onRequest', (request, reply, done) => {
      if (fastify.startUp.isComplete || request.routeOptions.config.isProbe) done()
      else reply.outcome('busy')
    })
  },
  { fastify: '5.x', name: 'start-up', dependencies: ['replies'] }
)
