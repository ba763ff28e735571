import { type Static, Type } from '@sinclair/typebox'
import type { FastifyInstance, FastifyReply, FastifyRequest } from 'fastify'
import { type Config, passwordMax } from '../config/config.js'
import { mobileField } from '../http/schemas.js'
import { Refusal } from '../outcomes.js'
import { passwordField } from '../passwords/policy.js'
import type { Limit } from '../stores/rate-limits.js'
import type { User } from '../users/users.js'
import { loginLimits } from './login-limits.js'

export const LoginBody = Type.Object({ mobile: mobileField, password: passwordField })

export type LoginRequest = FastifyRequest<{ Body: Static<typeof LoginBody> }>

/** Returns the handler of POST /sessions. An unknown mobile takes as long as a wrong password and gets the same answer. */
export function logInHandler(fastify: FastifyInstance, config: Config) {
  return async function logIn(request: LoginRequest, reply: FastifyReply) {
    const { mobile, password } = request.body
    // In code points; JSON Schema's maxLength would be another outcome.
    if ([...password].length > passwordMax) return reply.outcome('password_length')

    // Refuse before any store is touched, if the hash queue is too long.
    const busySeconds = fastify.passwords.admissionDelaySeconds()
    if (busySeconds > 0) return reply.outcome('busy', { retryAfterSeconds: busySeconds })

    // Every try counts before the password is verified, so parallel guesses cannot slip through.
    const { resetOnSuccess, refundOnSuccess } = loginLimits(config, mobile, request.ip)
    const limits = [...resetOnSuccess, ...refundOnSuccess]
    const retryAfterSeconds = await fastify.rateLimits.consume(limits)
    if (retryAfterSeconds > 0) return reply.outcome('too_many_requests', { retryAfterSeconds })
    const consumedAt = performance.now()
    const refund = (refunded: Limit[]) =>
      fastify.rateLimits.refund(refunded, consumedAt).catch((err) => logUnrefunded(request, err))

    let user: User | undefined
    try {
      user = await findVerifiedUser(mobile, password, reply)
    } catch (error) {
      // A failure of the service is no failed login.
      await refund(limits)
      throw error
    }
    if (user === undefined) return reply.outcome('wrong_login')

    // A success is refunded, and resets the count of the mobile from this network, which is the owner's.
    const sessionUser = { user_id: user.id, name: user.name, mobile }
    const [session] = await Promise.all([
      fastify.sessions.start(request, reply, sessionUser, user.sessionEpoch),
      refund(refundOnSuccess),
      fastify.rateLimits.reset(resetOnSuccess).catch((err) => logUnrefunded(request, err))
    ])
    // A login without a session is useless.
    if (session === 'failed') return reply.outcome('storage_unavailable')
    // The password was reset, or the user logged out everywhere, after this login had read the row. Or Postgres has lost that in
    // a failover; then only a new reset helps, because this may be the former password.
    if (session === 'outdated') return reply.outcome('wrong_login')

    // Not awaited: it does not delay the answer. A shutdown waits for it.
    if (fastify.passwords.isOutdated(user.passwordHash)) fastify.inFlight.track(rehash(user, request))
    return reply.outcome('logged_in', { data: { ...sessionUser, session: true } })
  }

  /**
   * Returns the user if the password is theirs.
   *
   * @throws {Refusal} `busy` if the hash queue is too long now. The check before the stores were asked is not enough: a burst
   * of logins passes it before the first of them joins the queue.
   */
  async function findVerifiedUser(mobile: string, password: string, reply: FastifyReply): Promise<User | undefined> {
    const user = await fastify.users.find(mobile)
    const retryAfterSeconds = fastify.passwords.admissionDelaySeconds()
    if (retryAfterSeconds > 0) throw new Refusal('busy', undefined, { retryAfterSeconds })
    const matches = await fastify.passwords.verify(user?.passwordHash, password, reply.raw)
    return matches ? user : undefined
  }

  /** Replaces a hash that has outdated parameters, unless it has been replaced since, or the hash queue is too long. */
  async function rehash({ passwordHash }: User, { body: { mobile, password }, log, id }: LoginRequest): Promise<void> {
    try {
      if (fastify.passwords.admissionDelaySeconds() > 0) return
      await fastify.users.replaceHash(mobile, passwordHash, await fastify.passwords.hash(password))
    } catch (err) {
      log.error({ reqId: id, err }, 'an outdated hash could not be replaced')
    }
  }
}

/** Logs that a limit could not be refunded or reset. The try then counts as a failure until the window ends. */
function logUnrefunded({ log, id }: Pick<FastifyRequest, 'log' | 'id'>, err: unknown): void {
  log.error({ reqId: id, err }, 'a login could not be refunded')
}
