import { randomBytes } from 'node:crypto'
import fastifyCookie, { type CookieSerializeOptions, Signer } from '@fastify/cookie'
import fastifySession, { type SessionStore } from '@fastify/session'
import type { FastifyReply, FastifyRequest, Session } from 'fastify'
import fp from 'fastify-plugin'
import type { Result } from 'ioredis'
import type { Config } from '../config/config.js'

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
   * @returns the session's id; undefined if it could not be stored: then no cookie is sent
   */
  start(request: FastifyRequest, reply: FastifyReply, user: SessionUser): Promise<string | undefined>
  /** Takes back what `start` has done for a reply. */
  revoke(reply: FastifyReply, userId: string, sessionId: string): Promise<void>
  /** The user of the request's session, or undefined: no cookie, a forged one, or a session that has ended. */
  userOf(request: FastifyRequest): SessionUser | undefined
  /** Logs out: destroys the request's session, if there is one, and clears the cookie. */
  end(request: FastifyRequest, reply: FastifyReply): Promise<void>
  /** Destroys all sessions of a user. */
  endAll(userId: string): Promise<void>
  /** What @fastify/session is registered with around the routes that ask for `userOf` and `end`. */
  readonly options: fastifySession.FastifySessionOptions & { cookieName: string; secret: Signer }
}

declare module 'fastify' {
  interface FastifyInstance {
    sessions: Sessions
  }
  interface Session extends Partial<SessionUser> {}
}

const lifeSeconds = 86_400

/** The key is a contract with other services. */
const keyOf = (sessionId: string) => `session:${sessionId}`

/** The sessions of a user, by their end: a sorted set that ends with the last of them. */
const indexKey = (userId: string) => `sessions_of:${userId}`

/** So many sessions a user may have; one more ends the oldest. */
const sessionsMax = 100

declare module 'ioredis' {
  interface RedisCommander<Context> {
    indexSession(index: string, ...args: (string | number)[]): Result<string[], Context>
  }
}

/**
 * ARGV: the session's id, now, its life, the most sessions, and the id that it replaces or ''. Times in s. Returns the ids
 * of those that are too many.
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
 * Sessions in Redis behind a signed cookie. A route that starts one needs nothing else; a route that asks who is logged
 * in, or logs out, stands in the scope of {@link loadSessions}.
 */
export const sessions = fp<Pick<Config, 'sessionSecrets' | 'cookieSecure'>>(
  async (fastify, { sessionSecrets, cookieSecure }) => {
    // The prefix makes browsers refuse the cookie from a subdomain or over plain HTTP (RFC 6265bis, 4.1.3.2).
    const cookieName = cookieSecure ? '__Host-sid' : 'sid'
    const attributes = { path: '/', httpOnly: true, sameSite: 'lax', secure: cookieSecure } as const
    const cookie: CookieSerializeOptions = { ...attributes, maxAge: lifeSeconds }
    const signer = new Signer([...sessionSecrets])

    const save = (sessionId: string, session: Session) =>
      fastify.onRedis((redis) => redis.set(keyOf(sessionId), JSON.stringify(session), 'EX', lifeSeconds))
    const destroy = (sessionId: string) => fastify.onRedis((redis) => redis.del(keyOf(sessionId)))

    await fastify.onRedis(async (redis) => redis.defineCommand('indexSession', { numberOfKeys: 1, lua: indexSession }))
    const index = (userId: string, sessionId: string, former: string) => {
      const now = Math.floor(Date.now() / 1_000)
      return fastify.onRedis((redis) =>
        redis.indexSession(indexKey(userId), sessionId, now, lifeSeconds, sessionsMax, former)
      )
    }

    // After the session itself, or one that could not be ended would be none of `endAll`'s.
    const unindex = (userId: string, ...sessionIds: string[]) =>
      fastify.onRedis((redis) => redis.zrem(indexKey(userId), sessionIds))

    const store: SessionStore = {
      set(sessionId, session, done) {
        save(sessionId, session).then(() => done(), done)
      },
      get(sessionId, done) {
        fastify
          .onRedis((redis) => redis.get(keyOf(sessionId)))
          .then((json) => done(null, json === null ? null : parseSession(json)), done)
      },
      destroy(sessionId, done) {
        destroy(sessionId).then(() => done(), done)
      }
    }

    // A host application may have registered @fastify/cookie already.
    if (!fastify.hasRequestDecorator('cookies')) await fastify.register(fastifyCookie)

    fastify.decorate('sessions', {
      options: {
        secret: signer,
        store,
        cookieName,
        cookie: { ...attributes, maxAge: lifeSeconds * 1_000 },
        // Each of the two would add a round trip to requests that change nothing.
        rolling: false,
        saveUninitialized: false
      },

      // Not by way of @fastify/session: that makes a session for every request of its scope, refused ones included, and
      // hashes it three times; it would also read the former session before the body is known to be valid.
      async start(request, reply, user) {
        const former = signer.unsign(request.cookies[cookieName] ?? '').value
        const sessionId = randomBytes(24).toString('base64url')
        const expires = new Date(Date.now() + lifeSeconds * 1_000)
        const session = { cookie: { ...attributes, expires, originalMaxAge: lifeSeconds * 1_000 }, ...user }
        try {
          // In one trip.
          const [excess] = await Promise.all([
            index(user.user_id, sessionId, former ?? ''),
            save(sessionId, session),
            former !== null && destroy(former)
          ])
          await Promise.all(excess.map(destroy))
        } catch (err) {
          request.log.error({ reqId: request.id, err }, 'a session could not be stored')
          return undefined
        }
        reply.setCookie(cookieName, signer.sign(sessionId), cookie)
        return sessionId
      },

      async revoke(reply, userId, sessionId) {
        await destroy(sessionId)
        await unindex(userId, sessionId)
        reply.clearCookie(cookieName, cookie)
      },

      userOf({ session: { user_id, name, mobile } }) {
        if (user_id === undefined || name === undefined || mobile === undefined) return undefined
        return { user_id, name, mobile }
      },

      async end(request, reply) {
        const { user_id, sessionId } = request.session
        if (request.cookies[cookieName] === request.session.encryptedSessionId) {
          await request.session.destroy()
          if (user_id !== undefined) await unindex(user_id, sessionId)
        }
        // Or @fastify/session would clear it once more.
        request.cookies[cookieName] = undefined
        reply.clearCookie(cookieName, cookie)
      },

      async endAll(userId) {
        const sessionIds = await fastify.onRedis((redis) => redis.zrange(indexKey(userId), 0, '-1'))
        if (sessionIds.length === 0) return
        await Promise.all([
          ...sessionIds.map(destroy),
          // Those, and not the index: a session may have begun meanwhile.
          unindex(userId, ...sessionIds)
        ])
      }
    } satisfies Sessions)
  },
  { fastify: '5.x', name: 'sessions', dependencies: ['redis'] }
)

/** Gives the requests of its scope their session: @fastify/session, over what it gets wrong. */
export const loadSessions = fp(
  async (fastify) => {
    const { cookieName, secret } = fastify.sessions.options

    fastify.addHook('onRequest', async (request) => {
      request.raw.url = originForm(request.raw.url ?? '/')
      // @fastify/session accepts the cookies of all secrets, but clears those that the first has not signed. So it is
      // shown the cookie as the first signs it, or none.
      const { value } = secret.unsign(request.cookies[cookieName] ?? '')
      request.cookies[cookieName] = value === null ? undefined : secret.sign(value)
    })

    await fastify.register(fastifySession, fastify.sessions.options)
  },
  { fastify: '5.x', name: 'load-sessions', dependencies: ['sessions'] }
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
