import type { FastifyPluginAsync, FastifyReply } from 'fastify'
import type { Config } from '../config/config.js'
import { bodyMaxBytes, bodyOutcomes, repliesWith } from '../http/schemas.js'
import { LoggedInData } from '../sessions/schemas.js'
import { NewPasswordBody, type NewPasswordRequest, redeemCodeHandlers } from './redeem-code.js'

const schema = { tags: ['sign-up'], body: NewPasswordBody, response: repliesWith(LoggedInData) }

const newPasswordOutcomes = [
  ...bodyOutcomes,
  'passwords_differ',
  'password_length',
  'password_common',
  'wrong_code',
  'too_many_requests'
] as const

/** POST /users and PUT /users/password. */
export const userRoutes: FastifyPluginAsync<{ config: Config }> = async (fastify, { config }) => {
  const { signUp, resetPassword } = redeemCodeHandlers(fastify, config)
  fastify.route({
    method: 'POST',
    url: '/users',
    schema: { ...schema, operationId: 'signUp', summary: 'Sign up with a code and a password' },
    config: {
      outcomes: [...newPasswordOutcomes, 'registered', 'mobile_registered'],
      data: { registered: LoggedInData }
    },
    bodyLimit: bodyMaxBytes,
    handler: (request: NewPasswordRequest, reply: FastifyReply) => fastify.inFlight.track(signUp(request, reply))
  })
  fastify.route({
    method: 'PUT',
    url: '/users/password',
    schema: {
      ...schema,
      operationId: 'resetPassword',
      summary: 'Replace a forgotten password, and end all other sessions'
    },
    config: { outcomes: [...newPasswordOutcomes, 'password_reset'], data: { password_reset: LoggedInData } },
    bodyLimit: bodyMaxBytes,
    handler: (request: NewPasswordRequest, reply: FastifyReply) => fastify.inFlight.track(resetPassword(request, reply))
  })
}
