import { Type } from '@sinclair/typebox'
import type { FastifyPluginAsync, FastifyReply, FastifyRequest } from 'fastify'
import { loadSessions } from '../plugins/sessions.js'
import { repliesWith } from '../replies.js'

const User = Type.Object({ user_id: Type.String(), name: Type.String(), mobile: Type.String() })

export const sessionRoutes: FastifyPluginAsync = async (fastify) => {
  await fastify.register(loadSessions)
  fastify.route({ method: 'GET', url: '/session', schema: { response: repliesWith(User) }, handler: whoAmI })
  fastify.route({
    method: 'DELETE',
    url: '/session',
    schema: { response: repliesWith(Type.Object({})) },
    handler: logOut
  })

  async function whoAmI(request: FastifyRequest, reply: FastifyReply) {
    const user = fastify.sessions.userOf(request)
    return user === undefined ? reply.outcome('not_logged_in') : reply.outcome('session_found', user)
  }

  async function logOut(request: FastifyRequest, reply: FastifyReply) {
    await fastify.sessions.end(request, reply)
    return reply.outcome('logged_out')
  }
}
