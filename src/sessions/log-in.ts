import { type Static, Type } from '@sinclair/typebox'
import type { FastifyInstance, FastifyReply, FastifyRequest } from 'fastify'
import { passwordMax } from '../config/config.js'
import { networkOf } from '../http/network.js'
import { mobileField, passwordField } from '../http/schemas.js'
import { Refusal } from '../outcomes.js'
import type { Limit } from '../stores/rate-limits.js'
import type { User } from '../users/users.js'

export const LoginBody = Type.Object({ mobile: mobileField, password: passwordField })

export type LoginRequest = FastifyRequest<{ Body: Static<typeof LoginBody> }>

/** Failed logins of a mobile from one network in ten minutes. A person who fails more often is not the owner. */
const networkLimit = { max: 5, seconds: 600 }

/**
 * Failed logins of a mobile in an hour from all networks: NIST SP 800-63B, section 3.2.2, allows 100. It takes twenty
 * networks to lock an owner out, for at most an hour.
 */
const mobileLimit = { max: 100, seconds: 3_600 }

/** Returns the handler of POST /sessions. */
export function logInHandler(fastify: FastifyInstance) {
  return async function logIn(request: LoginRequest, reply: FastifyReply) {
    const { mobile, password } = request.body
    if ([...password].length > passwordMax) return reply.outcome('password_length')

    // Admit, before any store is touched.
    const busySeconds = fastify.passwords.admissionDelaySeconds()
    if (busySeconds > 0) return reply.outcome('busy', { retryAfterSeconds: busySeconds })

    // Attempts count up front and are refunded on success, so parallel guesses cannot slip through.
    const perNetwork = { ...networkLimit, key: `login_failures:{${mobile}}:${networkOf(request.ip)}` }
    const perMobile = { ...mobileLimit, key: `login_failures:{${mobile}}` }
    const retryAfterSeconds = await fastify.rateLimits.consume([perNetwork, perMobile])
    if (retryAfterSeconds > 0) return reply.outcome('too_many_requests', { retryAfterSeconds })

    const user = await findUser(request, reply, [perNetwork, perMobile])
    if (user === undefined) return reply.outcome('wrong_login')

    const sessionUser = { user_id: user.id, name: user.name, mobile }
    const [sessionId] = await Promise.all([
      fastify.sessions.start(request, reply, sessionUser),
      fastify.rateLimits.refund([perMobile]).catch((err) => logUnrefunded(request, err)),
      fastify.rateLimits.reset(perNetwork).catch((err) => logUnrefunded(request, err))
    ])
    if (sessionId === undefined) throw new Refusal('storage_unavailable')

    if (!(await isStillCurrent(user, request, reply))) {
      await fastify.sessions.revoke(reply, user.id, sessionId)
      return reply.outcome('wrong_login')
    }
    if (fastify.passwords.isOutdated(user.passwordHash)) fastify.inFlight.track(rehash(user, request))
    return reply.outcome('logged_in', { data: { ...sessionUser, session: true } })
  }

  /** Returns the user if the password is theirs. A failure of ours refunds the limits. */
  async function findUser(
    { body: { mobile, password }, log, id }: LoginRequest,
    reply: FastifyReply,
    limits: readonly Limit[]
  ): Promise<User | undefined> {
    try {
      const user = await fastify.users.find(mobile)
      // An unknown mobile takes the same time as a known one.
      const matches = await fastify.passwords.verify(user?.passwordHash, password, reply.raw)
      return matches ? user : undefined
    } catch (error) {
      await fastify.rateLimits.refund(limits).catch((err) => logUnrefunded({ log, id }, err))
      throw error
    }
  }

  /**
   * Checks the password again after the session is stored. A reset ends all sessions that exist at that moment; this one may
   * have been stored later, with the former password.
   */
  async function isStillCurrent(
    { passwordHash }: User,
    { body: { mobile, password } }: LoginRequest,
    reply: FastifyReply
  ): Promise<boolean> {
    const user = await fastify.users.find(mobile)
    if (user?.passwordHash === passwordHash) return true
    return fastify.passwords.verify(user?.passwordHash, password, reply.raw)
  }

  /** Replaces a hash that has outdated parameters. Runs after the answer, and not while the queue is too long. */
  async function rehash({ passwordHash }: User, { body: { mobile, password }, log, id }: LoginRequest): Promise<void> {
    try {
      if (fastify.passwords.admissionDelaySeconds() > 0) return
      await fastify.users.setPassword(mobile, await fastify.passwords.hash(password), passwordHash)
    } catch (err) {
      log.error({ reqId: id, err }, 'an outdated hash could not be replaced')
    }
  }
}

/** The attempt stays counted as a failure until its window ends. */
function logUnrefunded({ log, id }: Pick<FastifyRequest, 'log' | 'id'>, err: unknown): void {
  log.error({ reqId: id, err }, 'a login could not be refunded')
}
