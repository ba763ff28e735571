import type { FastifyPluginAsync, FastifyReply } from 'fastify'
import type { Config } from '../config/config.js'
import { bodyMaxBytes, repliesWith } from '../http/schemas.js'
import { Refusal } from '../outcomes.js'
import { passwordFault } from '../passwords/policy.js'
import { LoggedInData } from '../sessions/schemas.js'
import { firstSessionEpoch } from '../sessions/sessions.js'
import { NewPasswordBody, type NewPasswordRequest, newPasswordOutcomes } from './schemas.js'

/** POST /users: a mobile, its code and a password become a user with a session. */
export const signUpRoute: FastifyPluginAsync<{ config: Config }> = async (fastify, { config }) => {
  const { codes, inFlight, passwords, postgres, sessions, users } = fastify.mobileSignup

  fastify.route({
    method: 'POST',
    url: '/users',
    schema: {
      tags: ['sign-up'],
      operationId: 'signUp',
      summary: 'Sign up with a code and a password',
      body: NewPasswordBody,
      response: repliesWith(LoggedInData)
    },
    config: {
      outcomes: [...newPasswordOutcomes, 'registered', 'mobile_registered'],
      data: { registered: LoggedInData }
    },
    bodyLimit: bodyMaxBytes,
    handler: (request: NewPasswordRequest, reply: FastifyReply) => inFlight.track(signUp(request, reply))
  })

  async function signUp(request: NewPasswordRequest, reply: FastifyReply) {
    const { mobile, password } = request.body

    // 1. Validate what the schema cannot express.
    const fault = passwordFault(request.body, config.passwordMin)
    if (fault !== undefined) return reply.outcome(fault)

    // 2. Admit. Refuse before the code is touched, if Postgres is down or the hash queue is too long.
    postgres.assertAvailable()
    passwords.admit(reply.raw)

    // 3. Hold the code.
    const hold = await codes.hold(request, 'sign_up')
    if (hold.usedBy === '') return reply.outcome('mobile_registered')

    // If this instance dies from here on, nobody releases the code. After the lease, the same request holds it again, and looks
    // for the row first.
    let mayHaveWritten = false
    try {
      // 4. A repeat looks first. Postgres may also have lost the row of a used code; then the sign-up starts again.
      const isRepeat = hold.mayHaveWritten || hold.usedBy !== undefined
      let user = isRepeat ? await users.find(mobile) : undefined
      if (user === undefined) {
        // 5. Hash.
        const passwordHash = await passwords.hash(password, reply.raw)

        // 6. Insert. From here on the row may be committed, even if the answer of Postgres is lost.
        mayHaveWritten = true
        const userId = await users.insert(mobile, passwordHash)
        if (userId !== undefined) {
          if (hold.usedBy !== undefined) await endSessionsOfLostUser(request, hold.usedBy)
          return await succeed({ id: userId, name: mobile, sessionEpoch: firstSessionEpoch })
        }
        // The mobile has a user. This code created it only if another request has held the code, before or after this one. A repeat
        // may have found no row because a former primary answered.
        const isOnlyHolder = !isRepeat && (await codes.release(hold, 'used_in_vain'))
        if (isOnlyHolder) return reply.outcome('mobile_registered')
        user = await users.find(mobile)
        // Deleted since the INSERT, or lost in a failover.
        if (user === undefined) throw new Refusal('busy')
      }

      // An earlier request with this code has probably created the user. The same request has the same password.
      if (!(await passwords.verify(user.passwordHash, password, reply.raw))) {
        await codes.release(hold, 'wrong_password')
        return reply.outcome('mobile_registered')
      }
      reply.header('idempotent-replayed', 'true')
      return await succeed(user)
    } catch (error) {
      await codes.release(hold, mayHaveWritten ? 'may_have_written' : 'unused')
      throw error
    }

    // 7. and 8. Start a session and release the code, in one round trip, and reply. Without a session the request still succeeds:
    // the row is committed, and the client can log in. If the code is not released, the lease releases it, and a repeat finds the
    // row.
    async function succeed({ id, name, sessionEpoch }: { id: string; name: string; sessionEpoch: number }) {
      const user = { user_id: id, name, mobile }
      const [session] = await Promise.all([
        sessions.tryStart(request, reply, user, sessionEpoch),
        codes.release(hold, 'used', id)
      ])
      return reply.outcome('registered', { data: { ...user, session } })
    }
  }

  /**
   * Ends the sessions of a user whose row Postgres has lost. Only a successful INSERT proves the loss. A read does not: a former
   * primary may lack a row that exists, and then its user could not log in.
   */
  async function endSessionsOfLostUser({ log }: NewPasswordRequest, userId: string): Promise<void> {
    await sessions
      .endBefore(userId, firstSessionEpoch + 1)
      .catch((err) => log.error({ err }, 'the sessions of a lost user could not be ended'))
  }
}
