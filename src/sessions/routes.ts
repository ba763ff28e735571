import { type Static, Type } from '@sinclair/typebox'
import type { FastifyPluginAsync, FastifyReply, FastifyRequest } from 'fastify'
import { repliesWith, storeOutcomes } from '../http/schemas.js'
import { loadSession } from './load-session.js'
import { SessionUserData } from './schemas.js'

const LogOutQuery = Type.Object({
  everywhere: Type.Optional(
    Type.Union([Type.Literal('true'), Type.Literal('false')], { description: 'Whether all sessions of the user end' })
  )
})

type LogOutRequest = FastifyRequest<{ Querystring: Static<typeof LogOutQuery> }>

/** What the routes that read the cookie have in common. */
const cookieSchema = { tags: ['session'], security: [{ session: [] }] }

/** GET /session and DELETE /session. */
export const sessionRoutes: FastifyPluginAsync = async (fastify) => {
  const { inFlight, sessions } = fastify.mobileSignup

  await fastify.register(loadSession)
  fastify.route({
    method: 'GET',
    url: '/session',
    schema: {
      ...cookieSchema,
      operationId: 'whoAmI',
      summary: 'Who is logged in',
      response: repliesWith(SessionUserData)
    },
    config: {
      outcomes: [...storeOutcomes, 'session_found', 'not_logged_in'],
      data: { session_found: SessionUserData }
    },
    handler: whoAmI
  })
  fastify.route({
    method: 'DELETE',
    url: '/session',
    schema: {
      ...cookieSchema,
      operationId: 'logOut',
      summary: 'Log out; succeeds also if nobody was logged in',
      querystring: LogOutQuery,
      response: repliesWith(Type.Object({}))
    },
    config: {
      outcomes: [...storeOutcomes, 'logged_out', 'malformed_parameter', 'body_too_large', 'unsupported_content_type']
    },
    handler: (request: LogOutRequest, reply: FastifyReply) => inFlight.track(logOut(request, reply))
  })

  async function whoAmI(request: FastifyRequest, reply: FastifyReply) {
    const user = sessions.userOf(request)
    return user === undefined ? reply.outcome('not_logged_in') : reply.outcome('session_found', { data: user })
  }

  async function logOut(request: LogOutRequest, reply: FastifyReply) {
    if (request.query.everywhere === 'true') await sessions.endEverywhere(request)
    await sessions.end(request, reply)
    return reply.outcome('logged_out')
  }
}
