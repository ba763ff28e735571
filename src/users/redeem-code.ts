import { type Static, Type } from '@sinclair/typebox'
import type { FastifyPluginAsync, FastifyReply, FastifyRequest } from 'fastify'
import type { Attempt, CodePurpose, CompletedAttempt } from '../codes/codes.js'
import { bodyMaxBytes, type Config } from '../config/config.js'
import { bodyOutcomes, codeField, LoggedIn, mobileField, passwordField } from '../http/schemas.js'
import { type OutcomeName, type RouteOutcomes, repliesWith } from '../outcomes.js'
import { passwordFault } from '../passwords/policy.js'
import type { SessionUser } from '../sessions/sessions.js'

/** What proves a mobile and chooses a password. */
const NewPassword = Type.Object({
  mobile: mobileField,
  sms_code: codeField,
  password: passwordField,
  password2: passwordField
})

const newPasswordOutcomes: RouteOutcomes = {
  ...bodyOutcomes,
  passwords_differ: undefined,
  password_length: undefined,
  password_common: undefined,
  wrong_code: undefined
}
const signUpOutcomes: RouteOutcomes = { ...newPasswordOutcomes, registered: LoggedIn, mobile_registered: undefined }
const passwordResetOutcomes: RouteOutcomes = { ...newPasswordOutcomes, password_reset: LoggedIn }

type NewPasswordRequest = FastifyRequest<{ Body: Static<typeof NewPassword> }>

/** What a code is presented for: how it is done, and how that is answered. */
interface Purpose {
  name: CodePurpose
  /** Writes the hash. Returns whose it is; undefined, with the code used up, if it is nobody's. */
  store(
    request: NewPasswordRequest,
    reply: FastifyReply,
    attempt: Attempt,
    passwordHash: string
  ): Promise<SessionUser | undefined>
  success: OutcomeName
  failure: OutcomeName
}

export const userRoutes: FastifyPluginAsync<Pick<Config, 'passwordMin'>> = async (fastify, { passwordMin }) => {
  const signUp: Purpose = { name: 'sign-up', store: register, success: 'registered', failure: 'mobile_registered' }
  const passwordReset: Purpose = {
    name: 'password',
    store: replacePassword,
    success: 'password_reset',
    failure: 'wrong_code'
  }

  const schema = { tags: ['sign-up'], body: NewPassword, response: repliesWith(LoggedIn) }
  fastify.route({
    method: 'POST',
    url: '/users',
    schema: { ...schema, operationId: 'signUp', summary: 'Sign up with a code and a password' },
    config: { outcomes: signUpOutcomes },
    bodyLimit: bodyMaxBytes,
    handler: (request: NewPasswordRequest, reply) => fastify.finish(present(request, reply, signUp))
  })
  fastify.route({
    method: 'PUT',
    url: '/users/password',
    schema: {
      ...schema,
      operationId: 'resetPassword',
      summary: 'Replace a forgotten password, and end all other sessions'
    },
    config: { outcomes: passwordResetOutcomes },
    bodyLimit: bodyMaxBytes,
    handler: (request: NewPasswordRequest, reply) => fastify.finish(present(request, reply, passwordReset))
  })

  /** Takes the code that a request presents, and does what it is presented for. */
  async function present(request: NewPasswordRequest, reply: FastifyReply, purpose: Purpose) {
    if (refuse(request, reply)) return reply
    const take = await fastify.codes.take(request.body.mobile, request.body.sms_code, purpose.name)
    switch (take.state) {
      case 'wrong':
        return reply.outcome('wrong_code')
      case 'in_progress':
        return reply.outcome('busy')
      case 'done':
        return replay(request, reply, take, purpose)
      case 'taken': {
        const user = await orPutBack(take, reply, async (sent) => {
          const passwordHash = await fastify.passwords.hash(request.body.password, reply.raw)
          sent()
          return purpose.store(request, reply, take, passwordHash)
        })
        if (user === undefined) return reply.outcome(purpose.failure)
        return succeed(request, reply, take, user, purpose.success)
      }
    }
  }

  async function register(request: NewPasswordRequest, reply: FastifyReply, attempt: Attempt, passwordHash: string) {
    const { mobile, password } = request.body
    const userId = await fastify.users.insert(mobile, passwordHash)
    if (userId !== undefined) return { user_id: userId, name: mobile, mobile }
    // The row may be that of another attempt with this code: an earlier one whose outcome nobody knew, or a later one, if
    // the lease has ended meanwhile. Then its hash decides.
    const alone = await spend(attempt, reply)
    return alone && !attempt.again ? undefined : findVerified(mobile, password, reply)
  }

  async function replacePassword(
    { body: { mobile } }: NewPasswordRequest,
    reply: FastifyReply,
    attempt: Attempt,
    passwordHash: string
  ) {
    const row = await fastify.users.setPassword(mobile, passwordHash)
    if (row === undefined) {
      await spend(attempt, reply)
      return undefined
    }
    // Whoever knew the former password is out.
    await fastify.sessions.endAll(row.id)
    return { user_id: row.id, name: row.name, mobile }
  }

  /**
   * Answers a request whose password will not do, or that would wait too long for a thread. No store is touched.
   *
   * @throws {Refusal} while Postgres is known not to answer: the code would be taken, and a password hashed, for nothing
   */
  function refuse(request: NewPasswordRequest, reply: FastifyReply): boolean {
    const fault = passwordFault(request.body, passwordMin)
    if (fault === undefined) fastify.requirePostgres()
    const retryAfter = fault === undefined ? fastify.passwords.retryAfterSeconds() : undefined
    if (fault !== undefined) reply.outcome(fault)
    else if (retryAfter !== undefined) reply.header('retry-after', retryAfter).outcome('busy')
    return reply.sent
  }

  /**
   * Does what a code was taken for. The code goes back when a fault of ours, or the departure of the client, ends it.
   *
   * @param work calls its argument when from then on it may have been done, whatever is heard of it
   */
  async function orPutBack<T>(
    attempt: Attempt,
    reply: FastifyReply,
    work: (sent: () => void) => Promise<T>
  ): Promise<T> {
    let mayBeDone = attempt.again
    try {
      return await work(() => {
        mayBeDone = true
      })
    } catch (error) {
      await fastify.codes.putBack(attempt, mayBeDone).catch((err) => logLeft(reply, err))
      throw error
    }
  }

  /** Uses a code up. Returns whether no other attempt has had it since; true where Redis does not tell. */
  async function spend(attempt: Attempt, reply: FastifyReply): Promise<boolean> {
    try {
      return await fastify.codes.spend(attempt)
    } catch (err) {
      logLeft(reply, err)
      return true
    }
  }

  async function succeed(
    request: NewPasswordRequest,
    reply: FastifyReply,
    attempt: Attempt,
    user: SessionUser,
    outcome: OutcomeName
  ) {
    // In one trip. Without the second a retry has to wait for the lease's end, and then finds the row.
    const [session] = await Promise.all([
      fastify.sessions.start(request, reply, user),
      fastify.codes.complete(attempt, user.user_id).catch((err) => logLeft(reply, err))
    ])
    return reply.outcome(outcome, { ...user, session: session !== undefined })
  }

  /** Answers the repeated request of an attempt that is done. */
  async function replay(
    request: NewPasswordRequest,
    reply: FastifyReply,
    { userId, takenAt }: CompletedAttempt,
    { success, failure }: Purpose
  ) {
    const { mobile, password } = request.body
    const endReplay = (wrong: boolean) =>
      fastify.codes.endReplay(mobile, takenAt, wrong).catch((err) => logLeft(reply, err))
    let user: SessionUser | undefined
    try {
      user = await findVerified(mobile, password, reply)
    } catch (error) {
      await endReplay(false)
      throw error
    }
    if (user?.user_id !== userId) {
      await endReplay(true)
      return reply.outcome(failure)
    }
    const [session] = await Promise.all([fastify.sessions.start(request, reply, user), endReplay(false)])
    return reply.header('idempotent-replayed', 'true').outcome(success, { ...user, session: session !== undefined })
  }

  /** The user of a mobile if the password is theirs. */
  async function findVerified(mobile: string, password: string, reply: FastifyReply): Promise<SessionUser | undefined> {
    const user = await fastify.users.find(mobile)
    if (user === undefined) return undefined
    const matches = await fastify.passwords.verify(user.passwordHash, password, reply.raw)
    return matches ? { user_id: user.id, name: user.name, mobile } : undefined
  }
}

/** The marker of an attempt is left as it was: it ends with its lease. */
function logLeft({ log, request }: FastifyReply, err: unknown): void {
  log.error({ reqId: request.id, err }, 'an attempt could not be ended in Redis')
}
