import { type Static, Type } from '@sinclair/typebox'
import type { FastifyInstance, FastifyReply, FastifyRequest } from 'fastify'
import { passwordMax } from '../config/config.js'
import { networkOf } from '../http/network.js'
import { mobileField } from '../http/schemas.js'
import { passwordField } from '../passwords/policy.js'
import type { Limit } from '../stores/rate-limits.js'
import type { User } from '../users/users.js'

export const LoginBody = Type.Object({ mobile: mobileField, password: passwordField })

export type LoginRequest = FastifyRequest<{ Body: Static<typeof LoginBody> }>

/** Failed logins for one mobile from one network (an IPv4 address or an IPv6 /64) in ten minutes. */
const networkLimit = { max: 5, seconds: 600 }

/**
 * Failed logins for one mobile from all networks in an hour. NIST SP 800-63B, section 3.2.2, asks for at most 100 in a row.
 * A window that ends, instead of a lock, gives the owner the account back after an hour.
 */
const mobileLimit = { max: 100, seconds: 3_600 }

/** Returns the handler of POST /sessions. An unknown mobile takes as long as a wrong password and gets the same answer. */
export function logInHandler(fastify: FastifyInstance) {
  return async function logIn(request: LoginRequest, reply: FastifyReply) {
    const { mobile, password } = request.body
    // In code points; JSON Schema's maxLength would be another outcome.
    if ([...password].length > passwordMax) return reply.outcome('password_length')

    // Refuse before any store is touched, if the hash queue is too long.
    const busySeconds = fastify.passwords.admissionDelaySeconds()
    if (busySeconds > 0) return reply.outcome('busy', { retryAfterSeconds: busySeconds })

    // Every attempt counts before the password is verified, so parallel guesses cannot slip through. The braces put both keys
    // on one Cluster slot.
    const perNetwork = { ...networkLimit, key: `login_failures:{${mobile}}:${networkOf(request.ip)}` }
    const perMobile = { ...mobileLimit, key: `login_failures:{${mobile}}` }
    const retryAfterSeconds = await fastify.rateLimits.consume([perNetwork, perMobile])
    if (retryAfterSeconds > 0) return reply.outcome('too_many_requests', { retryAfterSeconds })

    const user = await findVerifiedUser(request, reply, [perNetwork, perMobile])
    if (user === undefined) return reply.outcome('wrong_login')

    // A success takes this attempt back for the mobile, and clears the count of this network, which is the owner's.
    const sessionUser = { user_id: user.id, name: user.name, mobile }
    const [sessionId] = await Promise.all([
      fastify.sessions.start(request, reply, sessionUser),
      fastify.rateLimits.refund([perMobile]).catch((err) => logUnrefunded(request, err)),
      fastify.rateLimits.reset(perNetwork).catch((err) => logUnrefunded(request, err))
    ])
    // A login without a session is useless.
    if (sessionId === undefined) return reply.outcome('storage_unavailable')

    if (!(await isPasswordUnchanged(user, request, reply))) {
      await fastify.sessions.revoke(reply, user.id, sessionId)
      return reply.outcome('wrong_login')
    }
    // Not awaited: it does not delay the answer. A shutdown waits for it.
    if (fastify.passwords.isOutdated(user.passwordHash)) fastify.inFlight.track(rehash(user, request))
    return reply.outcome('logged_in', { data: { ...sessionUser, session: true } })
  }

  /** Returns the user if the password is theirs. If the service fails, the attempt does not count. */
  async function findVerifiedUser(
    { body: { mobile, password }, log, id }: LoginRequest,
    reply: FastifyReply,
    limits: readonly Limit[]
  ): Promise<User | undefined> {
    try {
      const user = await fastify.users.find(mobile)
      const matches = await fastify.passwords.verify(user?.passwordHash, password, reply.raw)
      return matches ? user : undefined
    } catch (error) {
      await fastify.rateLimits.refund(limits).catch((refundError) => logUnrefunded({ log, id }, refundError))
      throw error
    }
  }

  /**
   * Checks the password again after the session is stored. A password reset during this login ends all sessions that exist at
   * that moment, but this one may be stored just after it, with the former password. A different hash alone does not tell:
   * `rehash` replaces it without a new password.
   */
  async function isPasswordUnchanged(
    { passwordHash }: User,
    { body: { mobile, password } }: LoginRequest,
    reply: FastifyReply
  ): Promise<boolean> {
    const user = await fastify.users.find(mobile)
    if (user?.passwordHash === passwordHash) return true
    return fastify.passwords.verify(user?.passwordHash, password, reply.raw)
  }

  /** Replaces a hash that has outdated parameters, unless it has been replaced since, or the hash queue is too long. */
  async function rehash({ passwordHash }: User, { body: { mobile, password }, log, id }: LoginRequest): Promise<void> {
    try {
      if (fastify.passwords.admissionDelaySeconds() > 0) return
      await fastify.users.setPassword(mobile, await fastify.passwords.hash(password), passwordHash)
    } catch (err) {
      log.error({ reqId: id, err }, 'an outdated hash could not be replaced')
    }
  }
}

/** Logs that a limit could not be refunded or reset. The attempt then counts as a failure until the window ends. */
function logUnrefunded({ log, id }: Pick<FastifyRequest, 'log' | 'id'>, err: unknown): void {
  log.error({ reqId: id, err }, 'a login could not be refunded')
}
