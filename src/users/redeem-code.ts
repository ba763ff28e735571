import { type Static, Type } from '@sinclair/typebox'
import type { FastifyInstance, FastifyReply, FastifyRequest } from 'fastify'
import type { Claim, CodePurpose, CompletedClaim } from '../codes/codes.js'
import type { Config } from '../config/config.js'
import { codeField, mobileField, passwordField } from '../http/schemas.js'
import type { OutcomeName } from '../outcomes.js'
import { passwordFault } from '../passwords/policy.js'
import type { SessionUser } from '../sessions/sessions.js'

export const NewPasswordBody = Type.Object({
  mobile: mobileField,
  sms_code: codeField,
  password: passwordField,
  password2: passwordField
})

export type NewPasswordRequest = FastifyRequest<{ Body: Static<typeof NewPasswordBody> }>

/** How a sign-up and a password reset differ. */
interface Redemption {
  purpose: CodePurpose
  /** Writes the hash. Returns undefined, with the code discarded, if the mobile has a row already, or has none. */
  write(
    request: NewPasswordRequest,
    reply: FastifyReply,
    claim: Claim,
    passwordHash: string
  ): Promise<SessionUser | undefined>
  success: OutcomeName
  failure: OutcomeName
}

/** Returns the handlers of POST /users and PUT /users/password: redeem a code for a user with a new password. */
export function redeemCodeHandlers(fastify: FastifyInstance, { passwordMin }: Config) {
  const signUp: Redemption = {
    purpose: 'sign-up',
    write: insertUser,
    success: 'registered',
    failure: 'mobile_registered'
  }
  const passwordReset: Redemption = {
    purpose: 'password',
    write: replacePassword,
    success: 'password_reset',
    failure: 'wrong_code'
  }

  async function redeemCode(request: NewPasswordRequest, reply: FastifyReply, redemption: Redemption) {
    const { mobile, sms_code, password } = request.body

    // Validate what the schema cannot express. No store is touched.
    const fault = passwordFault(request.body, passwordMin)
    if (fault !== undefined) return reply.outcome(fault)

    // Admit, before the code is touched. With Postgres away, the code would be claimed and a password hashed for nothing.
    fastify.postgres.assertAvailable()
    const retryAfterSeconds = fastify.passwords.admissionDelaySeconds()
    if (retryAfterSeconds > 0) return reply.outcome('busy', { retryAfterSeconds })

    // Claim the code.
    const claim = await fastify.codes.claim(mobile, sms_code, redemption.purpose)
    if (claim.state === 'wrong') return reply.outcome('wrong_code')
    if (claim.state === 'in_progress') return reply.outcome('busy')
    if (claim.state === 'done') return replay(request, reply, claim, redemption)

    // Hash, then write. A failure, or a client that disconnects before the hash starts, restores the code.
    let user: SessionUser | undefined
    let mayBeCommitted = claim.isReclaim
    try {
      const passwordHash = await fastify.passwords.hash(password, reply.raw)
      // From here on the row may be committed, even if the answer of Postgres is lost.
      mayBeCommitted = true
      user = await redemption.write(request, reply, claim, passwordHash)
    } catch (error) {
      await fastify.codes.restore(claim, mayBeCommitted).catch((err) => logUnendedClaim(request, err))
      throw error
    }
    if (user === undefined) return reply.outcome(redemption.failure)

    // Start a session and complete the claim, in one round trip. If the claim stays pending, a retry waits for the end of
    // the lease and then finds the row.
    const [sessionId] = await Promise.all([
      fastify.sessions.start(request, reply, user),
      fastify.codes.complete(claim, user.user_id).catch((err) => logUnendedClaim(request, err))
    ])
    return reply.outcome(redemption.success, { data: { ...user, session: sessionId !== undefined } })
  }

  async function insertUser(request: NewPasswordRequest, reply: FastifyReply, claim: Claim, passwordHash: string) {
    const { mobile, password } = request.body
    const userId = await fastify.users.insert(mobile, passwordHash)
    if (userId !== undefined) return { user_id: userId, name: mobile, mobile }
    // The mobile has a row. It is this request's own success if another request has held the same code: an earlier one whose
    // outcome is unknown, or a later one after this lease expired. Then the hash of the row decides.
    const isOnlyClaim = await discard(claim, request)
    if (isOnlyClaim && !claim.isReclaim) return undefined
    return findVerifiedUser(mobile, password, reply)
  }

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
    // Whoever logged in with the former password is logged out.
    await fastify.sessions.endAll(row.id)
    return { user_id: row.id, name: row.name, mobile }
  }

  /** Discards the code. Returns whether no other request has claimed it since, or true if Redis does not answer. */
  async function discard(claim: Claim, request: FastifyRequest): Promise<boolean> {
    try {
      return await fastify.codes.discard(claim)
    } catch (err) {
      logUnendedClaim(request, err)
      return true
    }
  }

  /** Answers the repeated request of a completed claim. */
  async function replay(
    request: NewPasswordRequest,
    reply: FastifyReply,
    completed: CompletedClaim,
    { success, failure }: Redemption
  ) {
    const { mobile, password } = request.body
    const endReplay = (passwordWasWrong: boolean) =>
      fastify.codes.endReplay(completed, passwordWasWrong).catch((err) => logUnendedClaim(request, err))
    let user: SessionUser | undefined
    try {
      user = await findVerifiedUser(mobile, password, reply)
    } catch (error) {
      await endReplay(false)
      throw error
    }
    if (user?.user_id !== completed.userId) {
      await endReplay(true)
      return reply.outcome(failure)
    }
    const [sessionId] = await Promise.all([fastify.sessions.start(request, reply, user), endReplay(false)])
    reply.header('idempotent-replayed', 'true')
    return reply.outcome(success, { data: { ...user, session: sessionId !== undefined } })
  }

  /** Returns the user of a mobile if the password is theirs. */
  async function findVerifiedUser(
    mobile: string,
    password: string,
    reply: FastifyReply
  ): Promise<SessionUser | undefined> {
    const user = await fastify.users.find(mobile)
    if (user === undefined) return undefined
    const matches = await fastify.passwords.verify(user.passwordHash, password, reply.raw)
    return matches ? { user_id: user.id, name: user.name, mobile } : undefined
  }

  return {
    signUp: (request: NewPasswordRequest, reply: FastifyReply) => redeemCode(request, reply, signUp),
    resetPassword: (request: NewPasswordRequest, reply: FastifyReply) => redeemCode(request, reply, passwordReset)
  }
}

/** The claim record stays as it was, and its lease expires. */
function logUnendedClaim({ log, id }: FastifyRequest, err: unknown): void {
  log.error({ reqId: id, err }, 'a claim could not be ended in Redis')
}
