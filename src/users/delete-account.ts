import { Type } from '@sinclair/typebox'
import type { FastifyPluginAsync, FastifyReply } from 'fastify'
import type { Config } from '../config/config.js'
import { bodyOutcomes, repliesWith } from '../http/schemas.js'
import { Refusal } from '../outcomes.js'
import { forgetFailures, loginLimits } from './login-limits.js'
import { CodeBody, type CodeBodyRequest } from './schemas.js'

/**
 * DELETE /users: a mobile and its code delete the user and end all its sessions. So a person leaves, and the new holder of a recycled
 * number frees it.
 */
export const deleteAccountRoute: FastifyPluginAsync<{ config: Config }> = async (fastify, { config }) => {
  const { codes, inFlight, postgres, rateLimits, sessions, users } = fastify.mobileSignup

  fastify.route({
    method: 'DELETE',
    url: '/users',
    schema: {
      tags: ['sign-up'],
      operationId: 'deleteAccount',
      summary: 'Delete the user of a mobile, and end all sessions; succeeds also if there is none',
      body: CodeBody,
      response: repliesWith(Type.Object({}))
    },
    config: { outcomes: [...bodyOutcomes, 'account_deleted', 'wrong_code', 'too_many_requests'] },
    handler: (request: CodeBodyRequest, reply: FastifyReply) => inFlight.track(deleteAccount(request, reply))
  })

  async function deleteAccount(request: CodeBodyRequest, reply: FastifyReply) {
    const { mobile } = request.body
    postgres.assertAvailable()
    const hold = await codes.hold(request, 'delete')
    if (hold === 'used_in_vain') return reply.outcome('account_deleted')

    try {
      // A used code deletes nothing again: the mobile may have a new user.
      const user = hold.usedBy === undefined ? await users.find(mobile) : undefined
      if (user !== undefined) {
        // First the sessions: if this instance dies after the DELETE, nobody knows the id any more. From here on no login starts a
        // session, until a reset or the repeat of this request.
        await sessions.endBefore(user.id, user.sessionEpoch + 1)
        // A reset or a logout everywhere has begun a later epoch. The repeat ends that one, too.
        if (!(await users.delete(mobile, user))) throw new Refusal('busy')
        await forgetFailures(rateLimits, loginLimits(config, mobile, request.ip).clearedByReset, request.log)
      }
      await codes.release(hold, 'used', hold.usedBy ?? user?.id)
      return reply.outcome('account_deleted')
    } catch (error) {
      await codes.release(hold, 'unused')
      throw error
    }
  }
}
