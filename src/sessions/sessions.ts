import { randomBytes } from 'node:crypto'
import fastifyCookie, { type CookieSerializeOptions, Signer } from '@fastify/cookie'
import type fastifySession from '@fastify/session'
import type { SessionStore } from '@fastify/session'
import type { FastifyReply, FastifyRequest, Session } from 'fastify'
import fp from 'fastify-plugin'
import type { Result } from 'ioredis'
import type { Config } from '../config/config.js'

/** The user of a session. `user_id` is a 64-bit integer in decimal. */
export interface SessionUser {
  user_id: string
  name: string
  mobile: string
}

interface Sessions {
  /**
   * Logs a user in: stores a session under a new id and sends it as a cookie. The session that the request came with is
   * destroyed.
   *
   * @returns the session id, or undefined if the session could not be stored; then no cookie is sent
   */
  start(request: FastifyRequest, reply: FastifyReply, user: SessionUser): Promise<string | undefined>
  /** Undoes {@link start}. */
  revoke(reply: FastifyReply, userId: string, sessionId: string): Promise<void>
  /** Returns the user of the request's session. Only in the scope of `loadSession`. */
  userOf(request: FastifyRequest): SessionUser | undefined
  /** Logs out: destroys the request's session and clears the cookie. Only in the scope of `loadSession`. */
  end(request: FastifyRequest, reply: FastifyReply): Promise<void>
  /** Destroys all sessions of a user. */
  endAll(userId: string): Promise<void>
  /** The options of @fastify/session, for `loadSession`. */
  readonly options: fastifySession.FastifySessionOptions & { cookieName: string; secret: Signer }
}

declare module 'fastify' {
  interface FastifyInstance {
    sessions: Sessions
  }
  interface Session extends Partial<SessionUser> {}
}

const sessionTtlSeconds = 86_400

/** One more session than this ends the oldest. */
const sessionsPerUserMax = 100

/** A contract with other services. */
const sessionKey = (sessionId: string) => `session:${sessionId}`

/** A sorted set of a user's session ids by the time at which they expire. It expires with the last of them. */
const indexKey = (userId: string) => `sessions_of:${userId}`

declare module 'ioredis' {
  interface RedisCommander<Context> {
    indexSession(index: string, ...args: (string | number)[]): Result<string[], Context>
  }
}

/**
 * ARGV: the session id, the time now, the TTL, the most sessions, and the id that it replaces or ''. Times in seconds.
 * Returns the ids of the sessions above the maximum, oldest first.
 */
const indexSession = `
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', ARGV[2])
redis.call('ZREM', KEYS[1], ARGV[5])
redis.call('ZADD', KEYS[1], ARGV[2] + ARGV[3], ARGV[1])
redis.call('EXPIRE', KEYS[1], ARGV[3])
local excess = redis.call('ZCARD', KEYS[1]) - ARGV[4]
if excess <= 0 then return {} end
local oldest = redis.call('ZRANGE', KEYS[1], 0, excess - 1)
redis.call('ZREM', KEYS[1], unpack(oldest))
return oldest
`

/**
 * Sessions in Redis behind a signed cookie. A route that starts a session needs only this plugin. A route that reads or
 * ends one also needs {@link loadSession} in its scope.
 */
export const sessions = fp<{ config: Config }>(
  async (fastify, { config: { sessionSecrets, cookieSecure } }) => {
    fastify.defineRedisScripts({ indexSession: { numberOfKeys: 1, lua: indexSession } })

    // With __Host- browsers refuse the cookie from a subdomain or over plain HTTP (RFC 6265bis, section 4.1.3.2).
    const cookieName = cookieSecure ? '__Host-sid' : 'sid'
    const attributes = { path: '/', httpOnly: true, sameSite: 'lax', secure: cookieSecure } as const
    const cookieOptions: CookieSerializeOptions = { ...attributes, maxAge: sessionTtlSeconds }
    const signer = new Signer([...sessionSecrets])

    const store = (sessionId: string, session: Session) =>
      fastify.withRedis((redis) => redis.set(sessionKey(sessionId), JSON.stringify(session), 'EX', sessionTtlSeconds))
    const destroy = (sessionId: string) => fastify.withRedis((redis) => redis.del(sessionKey(sessionId)))
    const addToIndex = (userId: string, sessionId: string, formerId: string) => {
      const now = Math.floor(Date.now() / 1_000)
      return fastify.withRedis((redis) =>
        redis.indexSession(indexKey(userId), sessionId, now, sessionTtlSeconds, sessionsPerUserMax, formerId)
      )
    }
    /** Call it after the session is destroyed: `endAll` does not find a session that has left the index. */
    const removeFromIndex = (userId: string, ...sessionIds: string[]) =>
      fastify.withRedis((redis) => redis.zrem(indexKey(userId), sessionIds))

    const sessionStore: SessionStore = {
      set(sessionId, session, done) {
        store(sessionId, session).then(() => done(), done)
      },
      get(sessionId, done) {
        fastify
          .withRedis((redis) => redis.get(sessionKey(sessionId)))
          .then((json) => done(null, json === null ? null : parseSession(json)), done)
      },
      destroy(sessionId, done) {
        destroy(sessionId).then(() => done(), done)
      }
    }

    // A host application may have registered @fastify/cookie.
    if (!fastify.hasRequestDecorator('cookies')) await fastify.register(fastifyCookie)

    fastify.decorate('sessions', {
      options: {
        secret: signer,
        store: sessionStore,
        cookieName,
        cookie: { ...attributes, maxAge: sessionTtlSeconds * 1_000 },
        // Each of these would add a round trip to requests that change nothing.
        rolling: false,
        saveUninitialized: false
      },

      // Not with @fastify/session: it would create a session for every request, also for refused ones, and hash it three
      // times; and it would read the former session before the body is validated.
      async start(request, reply, user) {
        const formerId = signer.unsign(request.cookies[cookieName] ?? '').value
        const sessionId = randomBytes(24).toString('base64url')
        const expires = new Date(Date.now() + sessionTtlSeconds * 1_000)
        const session = { cookie: { ...attributes, expires, originalMaxAge: sessionTtlSeconds * 1_000 }, ...user }
        try {
          // In one round trip.
          const [excessIds] = await Promise.all([
            addToIndex(user.user_id, sessionId, formerId ?? ''),
            store(sessionId, session),
            formerId !== null && destroy(formerId)
          ])
          await Promise.all(excessIds.map(destroy))
        } catch (err) {
          request.log.error({ reqId: request.id, err }, 'a session could not be stored')
          return undefined
        }
        reply.setCookie(cookieName, signer.sign(sessionId), cookieOptions)
        return sessionId
      },

      async revoke(reply, userId, sessionId) {
        await destroy(sessionId)
        await removeFromIndex(userId, sessionId)
        reply.clearCookie(cookieName, cookieOptions)
      },

      userOf({ session: { user_id, name, mobile } }) {
        if (user_id === undefined || name === undefined || mobile === undefined) return undefined
        return { user_id, name, mobile }
      },

      async end(request, reply) {
        const { user_id, sessionId } = request.session
        if (request.cookies[cookieName] === request.session.encryptedSessionId) {
          await request.session.destroy()
          if (user_id !== undefined) await removeFromIndex(user_id, sessionId)
        }
        // Otherwise @fastify/session clears the cookie a second time.
        request.cookies[cookieName] = undefined
        reply.clearCookie(cookieName, cookieOptions)
      },

      async endAll(userId) {
        const sessionIds = await fastify.withRedis((redis) => redis.zrange(indexKey(userId), 0, '-1'))
        if (sessionIds.length === 0) return
        // Removes these ids instead of the whole index: another session may have started meanwhile.
        await Promise.all([...sessionIds.map(destroy), removeFromIndex(userId, ...sessionIds)])
      }
    } satisfies Sessions)
  },
  { fastify: '5.x', name: 'sessions', dependencies: ['redis'] }
)

/**
 * Parses a stored session. Only its user counts: other services write sessions, too, and @fastify/session would copy every
 * field, also one with the name of its own methods.
 *
 * @returns null if it has no user
 */
function parseSession(json: string): Session | null {
  try {
    const { user_id, name, mobile } = JSON.parse(json)
    if ([user_id, name, mobile].some((field) => typeof field !== 'string')) return null
    return { cookie: { originalMaxAge: sessionTtlSeconds * 1_000 }, user_id, name, mobile }
  } catch {
    return null
  }
}
