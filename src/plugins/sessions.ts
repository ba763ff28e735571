import fastifyCookie, { type CookieSerializeOptions, Signer } from '@fastify/cookie'
import fastifySession, { type SessionStore } from '@fastify/session'
import type { FastifyReply, FastifyRequest, Session } from 'fastify'
import fp from 'fastify-plugin'
import type { Config } from '../config.js'

/** Who is logged in. `user_id` is a 64-bit integer in decimal. */
export interface SessionUser {
  user_id: string
  name: string
  mobile: string
}

interface Sessions {
  /**
   * Logs a user in: a fresh session id, stored and sent as a cookie. The session that the request came with, if any,
   * is destroyed.
   *
   * @returns whether the session could be stored; if not, no cookie is sent
   */
  start(request: FastifyRequest, user: SessionUser): Promise<boolean>
  /** The user of the request's session, or undefined: no cookie, a forged one, or a session that has ended. */
  userOf(request: FastifyRequest): SessionUser | undefined
  /** Logs out: destroys the request's session, if there is one, and clears the cookie. */
  end(request: FastifyRequest, reply: FastifyReply): Promise<void>
}

declare module 'fastify' {
  interface FastifyInstance {
    sessions: Sessions
  }
  interface FastifyRequest {
    /** Of a route with `startsSession`: the verified id of the session that the request came with. */
    formerSessionId: string | undefined
  }
  interface FastifyContextConfig {
    /** The route starts a session and asks nothing of an older one, which is therefore not read from Redis. */
    startsSession?: boolean
  }
  interface Session extends Partial<SessionUser> {}
}

const userFields = ['user_id', 'name', 'mobile'] as const satisfies readonly (keyof SessionUser)[]

const lifeSeconds = 86_400

/** The key is a contract with other services. */
const keyOf = (sessionId: string) => `session:${sessionId}`

export const sessions = fp<Pick<Config, 'sessionSecrets' | 'cookieSecure'>>(
  async (fastify, { sessionSecrets, cookieSecure }) => {
    // The prefix makes browsers refuse the cookie from a subdomain or over plain HTTP (RFC 6265bis, 4.1.3.2).
    const cookieName = cookieSecure ? '__Host-sid' : 'sid'
    const attributes = { path: '/', httpOnly: true, sameSite: 'lax', secure: cookieSecure } as const
    const cookie: CookieSerializeOptions = { ...attributes, maxAge: lifeSeconds }
    const signer = new Signer([...sessionSecrets])

    const store: SessionStore = {
      set(sessionId, session, done) {
        fastify
          .onRedis((redis) => redis.set(keyOf(sessionId), JSON.stringify(session), 'EX', lifeSeconds))
          .then(() => done(), done)
      },
      get(sessionId, done) {
        fastify
          .onRedis((redis) => redis.get(keyOf(sessionId)))
          .then((json) => done(null, json === null ? null : parseSession(json)), done)
      },
      destroy(sessionId, done) {
        fastify.onRedis((redis) => redis.del(keyOf(sessionId))).then(() => done(), done)
      }
    }

    // A host application may have registered @fastify/cookie already.
    if (!fastify.hasRequestDecorator('cookies')) await fastify.register(fastifyCookie, { parseOptions: cookie })

    // @fastify/session clears every cookie that the first secret has not signed, though it accepts those of the others.
    // So it is shown the cookie as the first secret signs it, or none.
    fastify.decorateRequest('formerSessionId', undefined)
    fastify.addHook('onRequest', async (request) => {
      request.raw.url = originForm(request.raw.url ?? '/')
      const signed = request.cookies[cookieName]
      if (signed === undefined) return
      const { value } = signer.unsign(signed)
      const { startsSession } = request.routeOptions.config
      request.cookies[cookieName] = value === null || startsSession ? undefined : signer.sign(value)
      if (value !== null && startsSession) request.formerSessionId = value
    })

    await fastify.register(fastifySession, {
      secret: signer,
      store,
      cookieName,
      cookie: { ...attributes, maxAge: lifeSeconds * 1_000 },
      // Each of the two would add a round trip to requests that change nothing.
      rolling: false,
      saveUninitialized: false
    })

    fastify.decorate('sessions', {
      async start(request, user) {
        const { session, formerSessionId } = request
        Object.assign(session, user)
        try {
          if (formerSessionId !== undefined) await fastify.onRedis((redis) => redis.del(keyOf(formerSessionId)))
          await session.save()
          return true
        } catch (err) {
          request.log.error({ reqId: request.id, err }, 'a session could not be stored')
          // Or @fastify/session would find it modified, try once more, and let that failure replace the reply.
          for (const field of userFields) delete session[field]
          return false
        }
      },

      userOf({ session: { user_id, name, mobile } }) {
        if (user_id === undefined || name === undefined || mobile === undefined) return undefined
        return { user_id, name, mobile }
      },

      async end(request, reply) {
        if (request.cookies[cookieName] === request.session.encryptedSessionId) await request.session.destroy()
        request.cookies[cookieName] = undefined
        reply.clearCookie(cookieName, cookie)
      }
    } satisfies Sessions)
  },
  { fastify: '5.x', name: 'sessions', dependencies: ['redis'] }
)

/**
 * A stored session, of which only who is logged in counts; null for what is none. Other services write here, too, and
 * @fastify/session would take over any field, its own methods' names included.
 */
function parseSession(json: string): Session | null {
  try {
    const { user_id, name, mobile } = JSON.parse(json)
    if ([user_id, name, mobile].some((field) => typeof field !== 'string')) return null
    return { cookie: { originalMaxAge: lifeSeconds * 1_000 }, user_id, name, mobile }
  } catch {
    return null
  }
}

/**
 * The path of a request target that a proxy sent in absolute form (RFC 9112, 3.2.2). @fastify/session compares the
 * target with the cookie's path, and without a match gives the request no session.
 */
function originForm(target: string): string {
  return target.replace(/^https?:\/\/[^/?#]*/i, '') || '/'
}
