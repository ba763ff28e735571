import type { FastifyPluginAsync, FastifyReply } from 'fastify'
import type { Config } from '../config/config.js'
import { repliesWith } from '../http/schemas.js'
import { passwordFault } from '../passwords/policy.js'
import { LoggedInData } from '../sessions/schemas.js'
import { forgetFailures, loginLimits } from './login-limits.js'
import { NewPasswordBody, type NewPasswordRequest, newPasswordOutcomes } from './schemas.js'

/** PUT /users/password: a mobile, its code and a new password end all earlier sessions of the user, and start one. */
export const resetPasswordRoute: FastifyPluginAsync<{ config: Config }> = async (fastify, { config }) => {
  const { codes, devices, inFlight, passwords, postgres, rateLimits, sessions, users } = fastify.mobileSignup

  fastify.route({
    method: 'PUT',
    url: '/users/password',
    schema: {
      tags: ['sign-up'],
      operationId: 'resetPassword',
      summary: 'Replace a forgotten password, and end all other sessions',
      body: NewPasswordBody,
      response: repliesWith(LoggedInData)
    },
    config: { outcomes: [...newPasswordOutcomes, 'password_reset'], data: { password_reset: LoggedInData } },
    handler: (request: NewPasswordRequest, reply: FastifyReply) => inFlight.track(resetPassword(request, reply))
  })

  /** The steps of a sign-up (sign-up.ts). An UPDATE can be repeated, so only a used code verifies the password instead. */
  async function resetPassword(request: NewPasswordRequest, reply: FastifyReply) {
    const { mobile, password } = request.body

    const fault = passwordFault(request.body, config.passwordMin)
    if (fault !== undefined) return reply.outcome(fault)

    postgres.assertAvailable()
    passwords.queue.admit(reply.raw)

    const hold = await codes.hold(request, 'password')
    // A mobile without a user is answered as a wrong code, so that the answer does not tell who is registered.
    if (hold === 'used_in_vain') return reply.outcome('wrong_code')

    try {
      // A used code writes nothing again, not even without a row: a former primary may lack one that exists.
      const isRepeat = hold.usedBy !== undefined
      const user = isRepeat
        ? await findVerifiedUser(request, reply)
        : await users.setPassword(mobile, await passwords.hash(password, reply.raw))
      if (user === undefined) {
        await codes.release(hold, isRepeat ? 'wrong_password' : 'used_in_vain')
        return reply.outcome('wrong_code')
      }

      // Whoever logged in with an earlier proof is logged out (G9). If that fails after the code is released, the repeat does it.
      await Promise.all([
        sessions.endBefore(user.id, user.sessionEpoch),
        forgetFailures(rateLimits, loginLimits(config, mobile, request.ip).clearedByReset, request.log),
        codes.release(hold, 'used', user.id)
      ])
      const sessionUser = { user_id: user.id, name: user.name, mobile }
      const session = await sessions.tryStart(request, reply, sessionUser, user.sessionEpoch)
      if (session) devices.remember(reply, mobile)
      if (isRepeat) reply.header('idempotent-replayed', 'true')
      return reply.outcome('password_reset', { data: { ...sessionUser, session } })
    } catch (error) {
      await codes.release(hold, 'unused')
      throw error
    }
  }

  async function findVerifiedUser({ body: { mobile, password } }: NewPasswordRequest, reply: FastifyReply) {
    const user = await users.find(mobile)
    return (await passwords.verify(user?.passwordHash, password, reply.raw)) ? user : undefined
  }
}
