import { type Static, Type } from '@sinclair/typebox'
import type { FastifyInstance, FastifyReply, FastifyRequest } from 'fastify'
import type { Claim, CodePurpose, CompletedClaim } from '../codes/codes.js'
import { ticketMaxLength } from '../codes/tickets.js'
import type { Config } from '../config/config.js'
import { mobileField, requiredText } from '../http/schemas.js'
import { type OutcomeName, Refusal } from '../outcomes.js'
import { passwordFault, passwordField } from '../passwords/policy.js'
import { loginLimits } from '../sessions/login-limits.js'
import type { SessionUser } from '../sessions/sessions.js'
import { firstSessionEpoch, type User } from './users.js'

export const NewPasswordBody = Type.Object({
  mobile: mobileField,
  sms_code: Type.String({ ...requiredText, maxLength: 16, examples: ['123456'] }),
  password: passwordField,
  password2: passwordField,
  ticket: Type.Optional(
    Type.String({
      maxLength: ticketMaxLength,
      examples: ['b2Zo1cNvTtQx.mf3k2p1q.Xq8mJ0Vw3eVdS1JxuC5Vb8o0cC7wU0kYy2bF1m9rPzE'],
      description: 'From `POST /sms_codes`. One that is forged, expired or for another mobile counts as absent.'
    })
  )
})

export type NewPasswordRequest = FastifyRequest<{ Body: Static<typeof NewPasswordBody> }>

/** The user whose code and password a request has proved, and the epoch of the session that it may start. */
interface CodeOwner {
  user: SessionUser
  sessionEpoch: number
}

/** The parts of the flow that differ between a sign-up and a password reset. */
interface Redemption {
  purpose: CodePurpose
  /**
   * Writes the hash to Postgres. If the row cannot be written, it ends the claim and returns undefined: a sign-up of a mobile
   * that belongs to another user, or a reset of a mobile without a user.
   */
  write(
    request: NewPasswordRequest,
    reply: FastifyReply,
    claim: Claim,
    passwordHash: string
  ): Promise<CodeOwner | undefined>
  success: OutcomeName
  /** The outcome if there is no user. It must not tell strangers more than they have proved. */
  failure: OutcomeName
}

/**
 * Returns the handlers of POST /users and PUT /users/password. Both use up a code and set a password: a sign-up creates the
 * user, a reset changes an existing one.
 */
export function redeemCodeHandlers(fastify: FastifyInstance, config: Config) {
  const signUpRedemption: Redemption = {
    purpose: 'sign_up',
    write: insertUser,
    success: 'registered',
    failure: 'mobile_registered'
  }
  const resetRedemption: Redemption = {
    purpose: 'password',
    write: replacePassword,
    success: 'password_reset',
    failure: 'wrong_code'
  }

  async function redeemCode(request: NewPasswordRequest, reply: FastifyReply, redemption: Redemption) {
    const { mobile, sms_code, ticket } = request.body

    // Validate what the schema cannot express. No store is touched.
    const fault = passwordFault(request.body, config.passwordMin)
    if (fault !== undefined) return reply.outcome(fault)

    // Refuse before the code is claimed, if Postgres is down or the hash queue is too long.
    fastify.postgres.assertAvailable()
    const retryAfterSeconds = fastify.passwords.admissionDelaySeconds()
    if (retryAfterSeconds > 0) return reply.outcome('busy', { retryAfterSeconds })

    const guesser = { ticket, address: request.ip }
    const claim = await fastify.codes.claim(mobile, sms_code, redemption.purpose, guesser)
    if (claim.state === 'spent') {
      return reply.outcome('too_many_requests', { retryAfterSeconds: claim.retryAfterSeconds })
    }
    if (claim.state === 'wrong') return reply.outcome('wrong_code')
    if (claim.state === 'in_progress') return reply.outcome('busy')
    if (claim.state === 'done') return replay(request, reply, claim, redemption)
    return writePassword(request, reply, claim, redemption)
  }

  /** Hashes and writes the password of a request that has claimed its code. */
  async function writePassword(request: NewPasswordRequest, reply: FastifyReply, claim: Claim, redemption: Redemption) {
    const { password } = request.body
    // Hash, then write. If one of them fails, or the client disconnects before a thread has the job in hand, put the code back.
    let owner: CodeOwner | undefined
    // An earlier request that claimed this code may have written the row.
    let mayBeCommitted = claim.isReclaim
    try {
      const passwordHash = await fastify.passwords.hash(password, reply.raw)
      // From here on the row may be committed, even if the answer of Postgres is lost.
      mayBeCommitted = true
      owner = await redemption.write(request, reply, claim, passwordHash)
    } catch (error) {
      await fastify.codes.restore(claim, mayBeCommitted).catch((err) => logUnendedClaim(request, err))
      throw error
    }
    if (owner === undefined) return reply.outcome(redemption.failure)

    // Both in one round trip. If the claim cannot be completed, retries are answered `busy` until the lease expires. The next
    // retry claims the code again and finds the row.
    const { user, sessionEpoch } = owner
    const [session] = await Promise.all([
      fastify.sessions.start(request, reply, user, sessionEpoch),
      fastify.codes.complete(claim, user.user_id).catch((err) => logUnendedClaim(request, err))
    ])
    // Without a session the request has still succeeded: the row is committed, and the client can log in.
    return reply.outcome(redemption.success, { data: { ...user, session: session === 'started' } })
  }

  async function insertUser(request: NewPasswordRequest, reply: FastifyReply, claim: Claim, passwordHash: string) {
    const { mobile, password } = request.body
    const userId = await fastify.users.insert(mobile, passwordHash)
    if (userId !== undefined) {
      if (claim.lostUserId !== undefined) await endSessionsOfLostUser(claim.lostUserId, request)
      return { user: { user_id: userId, name: mobile, mobile }, sessionEpoch: firstSessionEpoch }
    }
    // The mobile is registered. If an earlier request has held the same code, probably the same client sent it, and it created
    // this user. Then this request succeeds if its password matches the row.
    if (claim.isReclaim) {
      // The claim stays while the password is verified: if this instance dies now, the next retry finds it.
      const user = await fastify.users.find(mobile)
      // Deleted since the INSERT, or lost in a failover.
      if (user === undefined) throw new Refusal('busy')
      const owner = await verifyUser(user, mobile, password, reply)
      if (owner !== undefined) return owner
      await fastify.codes.concede(claim, user.id).catch((err) => logUnendedClaim(request, err))
      return undefined
    }
    const wasTakenOver = await discard(claim, request)
    // After the lease of this request had expired, a later request reclaimed the code. It may have created the user.
    const user = wasTakenOver ? await fastify.users.find(mobile) : undefined
    return user && verifyUser(user, mobile, password, reply)
  }

  /**
   * Ends the sessions of a user whose row Postgres has lost. Only a successful INSERT proves the loss. A read does not: a former
   * primary may lack a row that exists, and then its user could not log in.
   */
  async function endSessionsOfLostUser(userId: string, request: FastifyRequest): Promise<void> {
    await fastify.sessions
      .endBefore(userId, firstSessionEpoch + 1)
      .catch((err) => request.log.error({ reqId: request.id, err }, 'the sessions of a lost user could not be ended'))
  }

  /** Needs no case for a reclaim: the UPDATE can be repeated. */
  async function replacePassword(
    request: NewPasswordRequest,
    _reply: FastifyReply,
    claim: Claim,
    passwordHash: string
  ) {
    const { mobile } = request.body
    const row = await fastify.users.setPassword(mobile, passwordHash)
    if (row === undefined) {
      await discard(claim, request)
      return undefined
    }
    // Whoever logged in with an earlier proof is logged out (G9). The mobile's failed logins are forgotten.
    await Promise.all([
      fastify.sessions.endBefore(row.id, row.sessionEpoch),
      fastify.rateLimits
        .reset(loginLimits(config, mobile, request.ip).resetByPasswordReset)
        .catch((err) => request.log.error({ reqId: request.id, err }, 'failed logins could not be forgotten'))
    ])
    return { user: { user_id: row.id, name: row.name, mobile }, sessionEpoch: row.sessionEpoch }
  }

  /**
   * Discards the code. Returns whether another request has taken the claim over. If Redis does not answer, the answer is
   * false: without evidence of another claim, the mobile counts as another user's.
   */
  async function discard(claim: Claim, request: FastifyRequest): Promise<boolean> {
    try {
      const { wasTakenOver } = await fastify.codes.discard(claim)
      return wasTakenOver
    } catch (err) {
      logUnendedClaim(request, err)
      return false
    }
  }

  /** Answers a request that repeats an already successful one. */
  async function replay(
    request: NewPasswordRequest,
    reply: FastifyReply,
    completed: CompletedClaim,
    redemption: Redemption
  ) {
    const { mobile, password } = request.body
    const endReplay = (options: { passwordWasWrong: boolean }) =>
      fastify.codes.endReplay(completed, options).catch((err) => logUnendedClaim(request, err))
    let user: User | undefined
    let owner: CodeOwner | undefined
    try {
      user = await fastify.users.find(mobile)
      owner = user && (await verifyUser(user, mobile, password, reply))
    } catch (error) {
      await endReplay({ passwordWasWrong: false })
      throw error
    }
    // A failover or a restore of Postgres has lost the row, or the answer came from a former primary that lacks it.
    if (user === undefined) {
      const claim = await fastify.codes.reopen(completed)
      return claim === undefined ? reply.outcome('busy') : writePassword(request, reply, claim, redemption)
    }
    // Another password, or another user since.
    if (owner?.user.user_id !== completed.userId) {
      await endReplay({ passwordWasWrong: true })
      return reply.outcome(redemption.failure)
    }
    const [session] = await Promise.all([
      fastify.sessions.start(request, reply, owner.user, owner.sessionEpoch),
      endReplay({ passwordWasWrong: false })
    ])
    reply.header('idempotent-replayed', 'true')
    return reply.outcome(redemption.success, { data: { ...owner.user, session: session === 'started' } })
  }

  /** Returns the user if the password is theirs. Its duration is no secret: the caller has proved the code. */
  async function verifyUser(
    user: User,
    mobile: string,
    password: string,
    reply: FastifyReply
  ): Promise<CodeOwner | undefined> {
    const { id, name, passwordHash, sessionEpoch } = user
    if (!(await fastify.passwords.verify(passwordHash, password, reply.raw))) return undefined
    return { user: { user_id: id, name, mobile }, sessionEpoch }
  }

  return {
    signUp: (request: NewPasswordRequest, reply: FastifyReply) => redeemCode(request, reply, signUpRedemption),
    resetPassword: (request: NewPasswordRequest, reply: FastifyReply) => redeemCode(request, reply, resetRedemption)
  }
}

/** Logs that Redis could not record the end of a claim or a replay. Until the lease expires, retries are answered `busy`. */
function logUnendedClaim({ log, id }: FastifyRequest, err: unknown): void {
  log.error({ reqId: id, err }, 'a claim could not be ended in Redis')
}
