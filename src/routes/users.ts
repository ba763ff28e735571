import { type Static, Type } from '@sinclair/typebox'
import type { FastifyPluginAsync, FastifyReply, FastifyRequest } from 'fastify'
import type { Config } from '../config.js'
import { passwordFault } from '../password-policy.js'
import { repliesWith } from '../replies.js'

/** A required text: absent, null and "" are all the same fault. */
const required = { minLength: 1 }

const SignUp = Type.Object({
  mobile: Type.String({ ...required, pattern: '^1[3-9]\\d{9}$' }),
  sms_code: Type.String({ ...required, maxLength: 16 }),
  password: Type.String(required),
  password2: Type.String(required)
})

const Registered = Type.Object({
  user_id: Type.String(),
  name: Type.String(),
  mobile: Type.String(),
  /** False if the user is registered but the session could not be stored: the client logs in. */
  session: Type.Boolean()
})

export const userRoutes: FastifyPluginAsync<Pick<Config, 'passwordMin'>> = async (fastify, { passwordMin }) => {
  fastify.route({
    method: 'POST',
    url: '/users',
    schema: { body: SignUp, response: repliesWith(Registered) },
    config: { startsSession: true },
    handler: signUp
  })

  async function signUp(request: FastifyRequest<{ Body: Static<typeof SignUp> }>, reply: FastifyReply) {
    const { mobile, sms_code: code, password } = request.body
    const fault = passwordFault(request.body, passwordMin)
    if (fault !== undefined) return reply.outcome(fault)

    if (!(await fastify.codes.take(mobile, code))) return reply.outcome('wrong_code')

    const passwordHash = await fastify.passwords.hash(password)
    const userId = await fastify.users.insert(mobile, passwordHash)
    if (userId === undefined) return reply.outcome('mobile_registered')

    const user = { user_id: userId, name: mobile, mobile }
    const session = await fastify.sessions.start(request, user)
    return reply.outcome('registered', { ...user, session })
  }
}
