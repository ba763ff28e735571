import type { FastifyInstance, FastifyReply, FastifyRequest } from 'fastify'
import type { CodeRequest } from '../codes/codes.js'
import type { Config } from '../config/config.js'
import { forgetFailures, loginLimits } from './login-limits.js'

/** POST /sessions with a code instead of a password. It needs no hash. A mobile without a user is answered as a wrong code. */
export function createLogInByCode(fastify: FastifyInstance, config: Config) {
  const { codes, devices, postgres, rateLimits, sessions, users } = fastify.mobileSignup

  return async function logInByCode(request: FastifyRequest, reply: FastifyReply, body: CodeRequest['body']) {
    const { mobile } = body
    const { ip, log } = request
    postgres.assertAvailable()
    const hold = await codes.hold({ body, ip, log }, 'log_in')
    if (hold === 'used_in_vain') return reply.outcome('wrong_code')

    try {
      const user = await users.find(mobile)
      const usedBy = user && `${user.id}.${user.sessionEpoch}`
      // A repeat of a used code logs in again, but not after a reset or a logout everywhere (G9).
      if (user === undefined || (hold.usedBy !== undefined && hold.usedBy !== usedBy)) {
        await codes.release(hold, 'used_in_vain')
        return reply.outcome('wrong_code')
      }

      const sessionUser = { user_id: user.id, name: user.name, mobile }
      const [isLoggedIn] = await Promise.all([
        sessions.start(request, reply, sessionUser, user.sessionEpoch),
        codes.release(hold, 'used', usedBy),
        forgetFailures(rateLimits, loginLimits(config, mobile, ip).clearedBySuccess, log)
      ])
      // A reset or a logout everywhere has ended the epoch since the row was read.
      if (!isLoggedIn) return reply.outcome('wrong_code')
      devices.remember(reply, mobile)
      if (hold.usedBy !== undefined) reply.header('idempotent-replayed', 'true')
      return reply.outcome('logged_in', { data: { ...sessionUser, session: true } })
    } catch (error) {
      await codes.release(hold, 'unused')
      throw error
    }
  }
}
