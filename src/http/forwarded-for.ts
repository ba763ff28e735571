import fp from 'fastify-plugin'

/** How often at most the same warning is logged. */
const intervalMs = 60_000

/** Logs a warning if a proxy that `TRUST_PROXY` does not name sends X-Forwarded-For: its clients share the limits of one address. */
export const forwardedFor = fp(
  async (fastify) => {
    let lastWarningAt = Number.NEGATIVE_INFINITY
    fastify.addHook('onRequest', (request, _reply, done) => {
      // Without TRUST_PROXY, `ips` is absent. If the peer is not trusted, `ips` has only the address of the peer.
      const isIgnored = request.headers['x-forwarded-for'] !== undefined && (request.ips?.length ?? 1) === 1
      if (isIgnored && performance.now() - lastWarningAt >= intervalMs) {
        lastWarningAt = performance.now()
        const peer = request.socket.remoteAddress
        request.log.warn({ peer }, 'X-Forwarded-For is ignored: TRUST_PROXY does not name this peer')
      }
      done()
    })
  },
  { fastify: '5.x', name: 'forwarded-for' }
)
