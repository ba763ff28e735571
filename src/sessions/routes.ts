import { type Static, Type } from '@sinclair/typebox'
import type { FastifyPluginAsync, FastifyReply, FastifyRequest } from 'fastify'
import { bodyMaxBytes, passwordMax } from '../config/config.js'
import { networkOf } from '../http/network.js'
import { bodyOutcomes, LoggedIn, mobileField, passwordField, SessionUser, storedOutcomes } from '../http/schemas.js'
import { Refusal, type RouteOutcomes, repliesWith } from '../outcomes.js'
import type { User } from '../users/users.js'
import { loadSessions } from './sessions.js'

const Login = Type.Object({ mobile: mobileField, password: passwordField })
const LogOut = Type.Object({
  everywhere: Type.Optional(
    Type.Union([Type.Literal('true'), Type.Literal('false')], { description: 'Whether all sessions of the user end' })
  )
})

const logInOutcomes: RouteOutcomes = {
  ...bodyOutcomes,
  logged_in: LoggedIn,
  password_length: undefined,
  wrong_login: undefined,
  too_many_requests: undefined
}

/** Routes that read the cookie. */
const ofSession = { tags: ['session'], security: [{ session: [] }] }

type LoginRequest = FastifyRequest<{ Body: Static<typeof Login> }>

/** Failed logins of a mobile from one address in ten minutes: whoever fails more often is not the owner. */
const pairMax = 5
const pairSeconds = 600

/**
 * Failed logins of a mobile in an hour, from wherever: NIST SP 800-63B, 3.2.2, allows 100 at most. It takes twenty
 * addresses to shut the owner out, for an hour at most.
 */
const mobileMax = 100
const mobileSeconds = 3_600

export const sessionRoutes: FastifyPluginAsync = async (fastify) => {
  fastify.route({
    method: 'POST',
    url: '/sessions',
    schema: {
      tags: ['session'],
      operationId: 'logIn',
      summary: 'Log in with a password',
      body: Login,
      response: repliesWith(LoggedIn)
    },
    config: { outcomes: logInOutcomes },
    bodyLimit: bodyMaxBytes,
    handler: (request: LoginRequest, reply) => fastify.finish(logIn(request, reply))
  })
  await fastify.register(async (scope) => {
    await scope.register(loadSessions)
    scope.route({
      method: 'GET',
      url: '/session',
      schema: {
        ...ofSession,
        operationId: 'whoAmI',
        summary: 'Who is logged in',
        response: repliesWith(SessionUser)
      },
      config: { outcomes: { ...storedOutcomes, session_found: SessionUser, not_logged_in: undefined } },
      handler: whoAmI
    })
    scope.route({
      method: 'DELETE',
      url: '/session',
      schema: {
        ...ofSession,
        operationId: 'logOut',
        summary: 'Log out, also where nobody was logged in',
        querystring: LogOut,
        response: repliesWith(Type.Object({}))
      },
      config: {
        outcomes: {
          ...storedOutcomes,
          logged_out: undefined,
          malformed_parameter: undefined,
          body_too_large: undefined,
          unsupported_content_type: undefined
        }
      },
      handler: logOut
    })
  })

  async function logIn(request: LoginRequest, reply: FastifyReply) {
    const { mobile, password } = request.body
    if ([...password].length > passwordMax) return reply.outcome('password_length')
    const retryAfter = fastify.passwords.retryAfterSeconds()
    if (retryAfter !== undefined) return reply.header('retry-after', retryAfter).outcome('busy')

    const pair = {
      key: `login_failures:{${mobile}}:${networkOf(request.ip)}`,
      max: pairMax,
      seconds: pairSeconds
    }
    const perMobile = { key: `login_failures:{${mobile}}`, max: mobileMax, seconds: mobileSeconds }
    // Counted before the password is known to be wrong, or simultaneous guesses would all be looked at.
    const waitSeconds = await fastify.throttles.take([pair, perMobile])
    if (waitSeconds !== undefined) return reply.header('retry-after', waitSeconds).outcome('too_many_requests')

    let user: User | undefined
    let matches: boolean
    try {
      user = await fastify.users.find(mobile)
      matches = await fastify.passwords.verify(user?.passwordHash, password, reply.raw)
    } catch (error) {
      await fastify.throttles.giveBack([pair, perMobile]).catch((err) => logCounted(reply, err))
      throw error
    }
    if (!matches || user === undefined) return reply.outcome('wrong_login')

    const sessionUser = { user_id: user.id, name: user.name, mobile }
    const [sessionId] = await Promise.all([
      fastify.sessions.start(request, reply, sessionUser),
      fastify.throttles.giveBack([perMobile]).catch((err) => logCounted(reply, err)),
      fastify.throttles.clear(pair).catch((err) => logCounted(reply, err))
    ])
    if (sessionId === undefined) throw new Refusal('storage_unavailable')
    // A reset ends all sessions that it finds. This one may have come after that, with the former password.
    const now = await fastify.users.find(mobile)
    if (
      now?.passwordHash !== user.passwordHash &&
      !(await fastify.passwords.verify(now?.passwordHash, password, reply.raw))
    ) {
      await fastify.sessions.revoke(reply, user.id, sessionId)
      return reply.outcome('wrong_login')
    }
    if (fastify.passwords.isOutdated(user.passwordHash))
      fastify.finish(rehash(mobile, password, user.passwordHash, reply))
    return reply.outcome('logged_in', { ...sessionUser, session: true })
  }

  /** Replaces a hash of other parameters than are configured, behind the answer, unless the queue is long already. */
  async function rehash(
    mobile: string,
    password: string,
    former: string,
    { log, request }: FastifyReply
  ): Promise<void> {
    try {
      if (fastify.passwords.retryAfterSeconds() !== undefined) return
      await fastify.users.setPassword(mobile, await fastify.passwords.hash(password), former)
    } catch (err) {
      log.error({ reqId: request.id, err }, 'a password could not be hashed anew')
    }
  }

  async function whoAmI(request: FastifyRequest, reply: FastifyReply) {
    const user = fastify.sessions.userOf(request)
    return user === undefined ? reply.outcome('not_logged_in') : reply.outcome('session_found', user)
  }

  async function logOut(request: FastifyRequest<{ Querystring: Static<typeof LogOut> }>, reply: FastifyReply) {
    const user = fastify.sessions.userOf(request)
    if (request.query.everywhere === 'true' && user !== undefined) await fastify.sessions.endAll(user.user_id)
    await fastify.sessions.end(request, reply)
    return reply.outcome('logged_out')
  }
}

/** An attempt stays counted as a failure, until its time is over. */
function logCounted({ log, request }: FastifyReply, err: unknown): void {
  log.error({ reqId: request.id, err }, 'a login could not be taken back from the count of failures')
}
