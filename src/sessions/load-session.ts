import fastifySession from '@fastify/session'
import fp from 'fastify-plugin'

/** Loads the session of each request in its scope, with @fastify/session and corrections for what it gets wrong. */
export const loadSession = fp(
  async (fastify) => {
    const { sessions } = fastify.mobileSignup
    const { cookieName, secret } = sessions.options

    fastify.addHook('onRequest', async (request) => {
      request.raw.url = originForm(request.raw.url ?? '')
      // @fastify/session accepts a cookie signed with an older secret, but then clears it. So it gets the cookie as the
      // newest secret signs it.
      const sessionId = await sessions.findId(request)
      request.cookies[cookieName] = sessionId === undefined ? undefined : secret.sign(sessionId)
    })

    await fastify.register(fastifySession, sessions.options)

    fastify.addHook('onRequest', async (request) => {
      // @fastify/session would clear the cookie of a session that has ended, also in a refusal. It does not if there is no cookie.
      if (request.cookies[cookieName] !== request.session.encryptedSessionId) request.cookies[cookieName] = undefined
    })
  },
  { fastify: '5.x', name: 'load-session', dependencies: ['mobile-signup'] }
)

/**
 * Returns the path and query of a request target that a proxy sent in absolute form (RFC 9112, section 3.2.2).
 * @fastify/session compares the target with the path of the cookie, and without a match loads no session.
 */
function originForm(target: string): string {
  return target.replace(/^https?:\/\/[^/?#]*/i, '')
}
