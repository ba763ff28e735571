import { randomUUID } from 'node:crypto'
import fastifyCookie, { type CookieSerializeOptions, Signer } from '@fastify/cookie'
import type { SessionStore } from '@fastify/session'
import type { FastifyInstance, FastifyReply, FastifyRequest, Session } from 'fastify'
import type { Config } from '../config/config.js'
import { cookieAttributes, cookieNameOf, cookieValues } from '../http/cookies.js'
import type { RedisStore } from '../stores/redis.js'
import { bugLogger } from '../stores/store-unavailable.js'
import * as scripts from './scripts.js'

/** The user of a session. `user_id` is a 64-bit integer in decimal. */
export interface SessionUser {
  user_id: string
  name: string
  mobile: string
}

/** What counts of a stored session. */
interface StoredSession {
  user: SessionUser
  epoch: number
}

declare module 'fastify' {
  interface Session {
    /** Absent unless the session was stored. */
    owner?: StoredSession & {
      /** The oldest epoch of the user whose sessions live. The session has ended if its own is older. */
      currentEpoch: number
    }
  }
}

/** The session epoch of a new user. */
export const firstSessionEpoch = 0

const sessionTtlSeconds = 86_400

/** One more session than this ends the oldest. */
const sessionsPerUserMax = 100

/** A contract with other services. */
const sessionKey = (sessionId: string) => `session:${sessionId}`

/** A sorted set of a user's session ids by the time at which they expire. It expires with the last of them. */
const indexKey = (userId: string) => `sessions_of:${userId}`

/** The oldest epoch of a user whose sessions live; absent means any. On the Cluster slot of the index. */
const epochKey = (userId: string) => `{${indexKey(userId)}}:epoch`

/**
 * Longer than any session with an older epoch lives: a login that began before the new epoch may store its session a little
 * later.
 */
const epochTtlSeconds = 2 * sessionTtlSeconds

/**
 * Sessions in Redis behind a signed cookie. A route that reads or ends one needs {@link loadSession} in its scope.
 *
 * @param beginEpoch begins a session epoch of a user in Postgres, and returns it; undefined if the user has been deleted
 */
export async function createSessions(
  fastify: FastifyInstance,
  { sessionSecrets, cookieSecure }: Config,
  redis: RedisStore,
  beginEpoch: (user: SessionUser) => Promise<number | undefined>
) {
  redis.defineScripts({
    indexSession: { numberOfKeys: 2, lua: scripts.indexSession },
    endSessions: { numberOfKeys: 2, lua: scripts.endSessions }
  })

  const cookieName = cookieNameOf('sid', cookieSecure)
  const attributes = cookieAttributes(cookieSecure)
  const cookieOptions: CookieSerializeOptions = { ...attributes, maxAge: sessionTtlSeconds }
  const signer = new Signer([...sessionSecrets])
  const signedIds = (request: FastifyRequest) =>
    cookieValues(request, cookieName).flatMap((cookie) => signer.unsign(cookie).value ?? [])

  const destroy = (sessionId: string) => redis.run((client) => client.del(sessionKey(sessionId)))
  const removeFromIndex = (userId: string, sessionIds: string[]) =>
    redis.run((client) => client.zrem(indexKey(userId), sessionIds))
  /** Destroys sessions, and then removes them from the index. Other services read sessions without their epoch. */
  const destroyIndexed = async (userId: string, sessionIds: string[]) => {
    if (sessionIds.length === 0) return
    await Promise.all(sessionIds.map(destroy))
    await removeFromIndex(userId, sessionIds)
  }

  async function readStored(sessionId: string): Promise<StoredSession | null> {
    const json = await redis.run((client) => client.get(sessionKey(sessionId)))
    return json === null ? null : parseSession(json)
  }
  async function load(sessionId: string): Promise<Session | null> {
    const stored = await readStored(sessionId)
    if (stored === null) return null
    const { user, epoch } = stored
    const currentEpoch = await redis.run((client) => client.get(epochKey(user.user_id)))
    const cookie = { originalMaxAge: sessionTtlSeconds * 1_000 }
    return { cookie, owner: { user, epoch, currentEpoch: Number(currentEpoch ?? firstSessionEpoch) } }
  }

  /**
   * Logs a user in: stores a session under a new id and sends it as a cookie. The session that the request came with is
   * destroyed.
   *
   * Not with @fastify/session: it would create a session for every request, also for refused ones, and hash it three times;
   * and it would read the former session before the body is validated.
   *
   * @param epoch the session epoch that Postgres had together with the proof of the login, for example the password hash
   * @returns false if the epoch has ended; then no cookie is sent
   */
  async function start(request: FastifyRequest, reply: FastifyReply, user: SessionUser, epoch: number) {
    const formerIds = signedIds(request)
    // 244 random bits. Node.js makes UUIDs from random bytes in stock; randomBytes() took a tenth of the event loop's JavaScript.
    const sessionId = `${randomUUID()}${randomUUID()}`
    const expires = new Date(Date.now() + sessionTtlSeconds * 1_000)
    const session = { cookie: { ...attributes, expires, originalMaxAge: sessionTtlSeconds * 1_000 }, ...user, epoch }
    // In one round trip, except in a Cluster. The session is stored before it is indexed: then the end of its epoch is seen
    // here, or whoever ends the epoch finds the session in the index and destroys it.
    const stored = redis.run((client) =>
      client.set(sessionKey(sessionId), JSON.stringify(session), 'EX', sessionTtlSeconds)
    )
    if (redis.isCluster) await stored
    const [, excessIds] = await Promise.all([
      stored,
      redis.run((client) => {
        const keys = [indexKey(user.user_id), epochKey(user.user_id)] as const
        return client.indexSession(...keys, sessionId, epoch, sessionTtlSeconds, sessionsPerUserMax, ...formerIds)
      })
    ])
    if (excessIds === null) {
      await destroy(sessionId)
      return false
    }
    // Not before: a refused request ends no session.
    await Promise.all([destroyIndexed(user.user_id, excessIds), ...formerIds.map(destroy)])
    reply.setCookie(cookieName, signer.sign(sessionId), cookieOptions)
    return true
  }

  /** Ends all sessions of a user that have an older epoch, also those that are stored later. Those of `kept` stay stored. */
  async function endBefore(userId: string, epoch: number, kept: readonly string[] = []): Promise<void> {
    const sessionIds = await redis.run((client) =>
      client.endSessions(indexKey(userId), epochKey(userId), epoch, epochTtlSeconds)
    )
    // Not those of this epoch or a later one, which may have started meanwhile.
    const sessions = await Promise.all(sessionIds.map(readStored))
    await destroyIndexed(
      userId,
      sessionIds.filter((id, index) => (sessions[index]?.epoch ?? firstSessionEpoch) < epoch && !kept.includes(id))
    )
  }

  const sessionStore: SessionStore = {
    set(_sessionId, _session, done) {
      done(new Error('only start() stores sessions: no route changes one'))
    },
    get(sessionId, done) {
      load(sessionId).then((session) => done(null, session), done)
    },
    destroy(sessionId, done) {
      destroy(sessionId).then(() => done(), done)
    }
  }

  // A host application may have registered @fastify/cookie.
  if (!fastify.hasRequestDecorator('cookies')) await fastify.register(fastifyCookie)

  return {
    /** The options of @fastify/session, for `loadSession`. */
    options: {
      secret: signer,
      store: sessionStore,
      cookieName,
      cookie: { ...attributes, maxAge: sessionTtlSeconds * 1_000 },
      // Each of these would add a round trip to requests that change nothing.
      rolling: false,
      saveUninitialized: false
    },

    start,

    /** Like `start`, for a request that succeeds without a session, too: an error is logged, and the result false. */
    tryStart(request: FastifyRequest, reply: FastifyReply, user: SessionUser, epoch: number): Promise<boolean> {
      return start(request, reply, user, epoch).catch((error) => {
        bugLogger(request.log, 'a session could not be stored')(error)
        return false
      })
    },

    /** Returns the id in the session cookie that verifies. Of several, it is the first one whose session is stored. */
    async findId(request: FastifyRequest): Promise<string | undefined> {
      const ids = signedIds(request)
      if (ids.length < 2) return ids[0]
      const stored = await Promise.all(ids.map(readStored))
      return ids.find((_, n) => stored[n] !== null) ?? ids[0]
    },

    /** Returns the user of the request's session. Only in the scope of `loadSession`. */
    userOf({ session: { owner } }: FastifyRequest): SessionUser | undefined {
      return owner === undefined || owner.epoch < owner.currentEpoch ? undefined : owner.user
    },

    /** Logs out: destroys the request's session and clears the cookie. Only in the scope of `loadSession`. */
    async end(request: FastifyRequest, reply: FastifyReply): Promise<void> {
      const ids = signedIds(request)
      await Promise.all(ids.map(destroy))
      const { owner } = request.session
      if (owner !== undefined) await removeFromIndex(owner.user.user_id, ids)
      // Otherwise @fastify/session clears the cookie a second time.
      request.cookies[cookieName] = undefined
      reply.clearCookie(cookieName, cookieOptions)
    },

    endBefore,

    /** Ends all other sessions of the user to whom the request's session belongs. Only in the scope of `loadSession`. */
    async endEverywhere(request: FastifyRequest): Promise<void> {
      const { owner } = request.session
      if (owner === undefined) return
      const { user, epoch, currentEpoch } = owner
      // Its own session stays for `end`: if another one cannot be destroyed, the retry still has it.
      const kept = signedIds(request)
      // An outdated session has ended. Its logout may have failed before it destroyed all others, so only that is repeated.
      if (epoch < currentEpoch) return endBefore(user.user_id, currentEpoch, kept)
      const newEpoch = await beginEpoch(user)
      // Without a row the user has been deleted, and starts no session any more.
      await endBefore(user.user_id, newEpoch ?? epoch + 1, kept)
    }
  }
}

/**
 * Parses a stored session. Only its user and its epoch count: other services write sessions, too, and @fastify/session would
 * copy every field, also one with the name of its own methods.
 *
 * @returns null if it has no user; without an epoch it has the first one
 */
function parseSession(json: string): StoredSession | null {
  try {
    const { user_id, name, mobile, epoch } = JSON.parse(json)
    if ([user_id, name, mobile].some((field) => typeof field !== 'string')) return null
    return { user: { user_id, name, mobile }, epoch: Number.isInteger(epoch) ? epoch : firstSessionEpoch }
  } catch {
    return null
  }
}
