import type { FastifyPluginAsync, FastifyReply } from 'fastify'
import type { Hold } from '../codes/codes.js'
import type { Config } from '../config/config.js'
import { repliesWith } from '../http/schemas.js'
import { Refusal } from '../outcomes.js'
import { passwordFault } from '../passwords/policy.js'
import { LoggedInData } from '../sessions/schemas.js'
import { firstSessionEpoch } from '../sessions/sessions.js'
import { bugLogger } from '../stores/store-unavailable.js'
import { NewPasswordBody, type NewPasswordRequest, newPasswordOutcomes } from './schemas.js'
import type { User } from './users.js'

/** POST /users: a mobile, its code and a password become a user with a session. */
export const signUpRoute: FastifyPluginAsync<{ config: Config }> = async (fastify, { config }) => {
  const { codes, devices, inFlight, passwords, postgres, sessions, users } = fastify.mobileSignup

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
    handler: (request: NewPasswordRequest, reply: FastifyReply) => inFlight.track(signUp(request, reply))
  })

  async function signUp(request: NewPasswordRequest, reply: FastifyReply) {
    const { mobile, password } = request.body

    // 1. Validate what the schema cannot express.
    const fault = passwordFault(request.body, config.passwordMin)
    if (fault !== undefined) return reply.outcome(fault)

    // 2. Admit. Refuse before the code is touched, if Postgres is down or the hash queue is too long.
    postgres.assertAvailable()
    passwords.queue.admit(reply.raw)

    // 3. Hold the code.
    const hold = await codes.hold(request, 'sign_up')
    if (hold === 'used_in_vain') return reply.outcome('mobile_registered')

    // If this instance dies from here on, nobody releases the code. After the lease, the same request holds it again, and looks
    // for the row first.
    let mayHaveInserted = false
    try {
      // 4. A repeat looks first. Postgres may also have lost the row of a used code; then the sign-up starts again.
      const isRepeat = hold.mayHaveWritten || hold.usedBy !== undefined
      let user = isRepeat ? await users.find(mobile) : undefined
      if (user === undefined) {
        // 5. Hash.
        const passwordHash = await passwords.hash(password, reply.raw)

        // 6. Insert. From here on the row may be committed, even if the answer of Postgres is lost.
        mayHaveInserted = true
        const userId = await users.insert(mobile, passwordHash)
        if (userId !== undefined) {
          if (hold.usedBy !== undefined) inFlight.track(endSessionsOfLostUser(request, hold.usedBy))
          return await succeed(request, reply, hold, { id: userId, name: mobile, sessionEpoch: firstSessionEpoch })
        }
        // If nobody else has held the code, the mobile was registered before. Otherwise another request may have inserted the row
        // while this one was slow, or while a former primary answered that there is none.
        if (!isRepeat) {
          const isOnlyHolder = await codes.release(hold, 'used_in_vain')
          if (isOnlyHolder) return reply.outcome('mobile_registered')
          // The repeat of this request will know.
          if (isOnlyHolder === undefined) throw new Refusal('storage_unavailable')
        }
        user = await users.find(mobile)
        // Deleted since the INSERT, or lost in a failover.
        if (user === undefined) throw new Refusal('busy')
      }

      // An earlier request with this code may have inserted the row. The same request has the same password.
      if (!(await passwords.verify(user.passwordHash, password, reply.raw))) {
        await codes.release(hold, 'wrong_password')
        return reply.outcome('mobile_registered')
      }
      reply.header('idempotent-replayed', 'true')
      return await succeed(request, reply, hold, user)
    } catch (error) {
      await codes.release(hold, mayHaveInserted ? 'may_have_written' : 'unused')
      throw error
    }
  }

  /**
   * 7. and 8. Starts a session and releases the code, in one round trip, and replies. Without a session the request still succeeds:
   * the row is committed, and the client can log in. If the code cannot be released, the lease ends, and a repeat finds the row.
   */
  async function succeed(
    request: NewPasswordRequest,
    reply: FastifyReply,
    hold: Hold,
    { id, name, sessionEpoch }: Pick<User, 'id' | 'name' | 'sessionEpoch'>
  ) {
    const user = { user_id: id, name, mobile: hold.mobile }
    const [session] = await Promise.all([
      sessions.tryStart(request, reply, user, sessionEpoch),
      codes.release(hold, 'used', id)
    ])
    if (session) devices.remember(reply, hold.mobile)
    return reply.outcome('registered', { data: { ...user, session } })
  }

  /**
   * Ends the sessions of a user whose row Postgres has lost. Only a successful INSERT proves the loss. A read does not: a former
   * primary may lack a row that exists, and then its user could not log in.
   */
  async function endSessionsOfLostUser({ log }: NewPasswordRequest, userId: string): Promise<void> {
    await sessions
      .endBefore(userId, firstSessionEpoch + 1)
      .catch(bugLogger(log, 'the sessions of a lost user could not be ended'))
  }
}
