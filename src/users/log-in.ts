import { randomUUID } from 'node:crypto'
import { type Static, Type } from '@sinclair/typebox'
import type { FastifyPluginAsync, FastifyReply, FastifyRequest } from 'fastify'
import { type Config, passwordMax } from '../config/config.js'
import { bodyMaxBytes, bodyOutcomes, mobileField, repliesWith } from '../http/schemas.js'
import { QueueFull } from '../passwords/hash-queue.js'
import { passwordField } from '../passwords/policy.js'
import { LoggedInData } from '../sessions/schemas.js'
import type { Limit } from '../stores/rate-limits.js'
import { loginLimits } from './login-limits.js'
import { findVerifiedUser, type User } from './users.js'

const LoginBody = Type.Object({ mobile: mobileField, password: passwordField })

type LoginRequest = FastifyRequest<{ Body: Static<typeof LoginBody> }>

/** POST /sessions. An unknown mobile takes as long as a wrong password and gets the same answer. */
export const logInRoute: FastifyPluginAsync<{ config: Config }> = async (fastify, { config }) => {
  const { inFlight, passwords, rateLimits, sessions, users } = fastify.mobileSignup

  fastify.route({
    method: 'POST',
    url: '/sessions',
    schema: {
      tags: ['session'],
      operationId: 'logIn',
      summary: 'Log in with a password',
      body: LoginBody,
      response: repliesWith(LoggedInData)
    },
    config: {
      outcomes: [...bodyOutcomes, 'logged_in', 'password_length', 'wrong_login', 'too_many_requests'],
      data: { logged_in: LoggedInData }
    },
    bodyLimit: bodyMaxBytes,
    handler: (request: LoginRequest, reply: FastifyReply) => inFlight.track(logIn(request, reply))
  })

  async function logIn(request: LoginRequest, reply: FastifyReply) {
    const { mobile, password } = request.body
    // In code points; JSON Schema's maxLength would be another outcome.
    if ([...password].length > passwordMax) return reply.outcome('password_length')

    // Refuse before any store is touched, if the hash queue is too long.
    passwords.admit(reply.raw)

    // Every try counts before the password is verified, so parallel guesses cannot slip through.
    const { resetOnSuccess, refundOnSuccess } = loginLimits(config, mobile, request.ip)
    const limits = [...resetOnSuccess, ...refundOnSuccess]
    const unit = randomUUID()
    // If it fails, the try counts as a failure until the window ends.
    const logUnrefunded = (err: unknown) => request.log.error({ err }, 'a login could not be refunded')
    const refund = (refunded: Limit[]) => rateLimits.refund(refunded, unit).catch(logUnrefunded)

    let user: User | undefined
    try {
      const retryAfterSeconds = await rateLimits.consume(limits, unit)
      if (retryAfterSeconds > 0) return reply.outcome('too_many_requests', { retryAfterSeconds })
      user = await findVerifiedUser(fastify.mobileSignup, mobile, password, reply.raw)
    } catch (error) {
      // A failure of the service is no failed login.
      await refund(limits)
      throw error
    }
    if (user === undefined) return reply.outcome('wrong_login')

    // A success is refunded, and resets the count of the mobile from this network, which is the owner's.
    const sessionUser = { user_id: user.id, name: user.name, mobile }
    const [isLoggedIn] = await Promise.all([
      sessions.start(request, reply, sessionUser, user.sessionEpoch),
      refund(refundOnSuccess),
      rateLimits.reset(resetOnSuccess).catch(logUnrefunded)
    ])
    // The password was reset, or the user logged out everywhere, after this login had read the row. Or Postgres has lost that in
    // a failover; then only a new reset helps, because this may be the former password.
    if (!isLoggedIn) return reply.outcome('wrong_login')

    // Not awaited: it does not delay the answer. A shutdown waits for it.
    if (passwords.isOutdated(user.passwordHash)) inFlight.track(rehash(user, request))
    return reply.outcome('logged_in', { data: { ...sessionUser, session: true } })
  }

  /** Replaces a hash that has outdated parameters, unless it has been replaced since, or the hash queue is too long. */
  async function rehash({ passwordHash }: User, { body: { mobile, password }, log }: LoginRequest): Promise<void> {
    try {
      passwords.admit()
      await users.replaceHash(mobile, passwordHash, await passwords.hash(password))
    } catch (err) {
      if (!(err instanceof QueueFull)) log.error({ err }, 'an outdated hash could not be replaced')
    }
  }
}
