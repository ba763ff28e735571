import { type Static, Type } from '@sinclair/typebox'
import type { FastifyPluginAsync, FastifyReply, FastifyRequest } from 'fastify'
import { bodyMaxBytes, type Config } from '../config.js'
import { passwordFault } from '../password-policy.js'
import type { TakenCode } from '../plugins/codes.js'
import { repliesWith } from '../replies.js'

/** A required text: absent, null and "" are all the same fault. Half a surrogate pair is no text. */
const required = { minLength: 1, format: 'well-formed' }

const SignUp = Type.Object({
  mobile: Type.String({ ...required, pattern: '^1[3-9]\\d{9}$' }),
  sms_code: Type.String({ ...required, maxLength: 16 }),
  password: Type.String(required),
  password2: Type.String(required)
})

type SignUpRequest = FastifyRequest<{ Body: Static<typeof SignUp> }>

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
    bodyLimit: bodyMaxBytes,
    handler(request: SignUpRequest, reply) {
      const signingUp = signUp(request, reply)
      running.add(signingUp)
      const settled = () => running.delete(signingUp)
      signingUp.then(settled, settled)
      return signingUp
    }
  })

  // The server waits for connections. A client that has gone leaves none, but its sign-up still has a code in hand; this
  // hook runs before those that close the stores, as Fastify takes them from the last to the first.
  const running = new Set<Promise<unknown>>()
  fastify.addHook('onClose', async () => {
    await Promise.allSettled(running)
  })

  async function signUp(request: SignUpRequest, reply: FastifyReply) {
    const { mobile, sms_code: code, password } = request.body
    const fault = passwordFault(request.body, passwordMin)
    if (fault !== undefined) return reply.outcome(fault)

    const retryAfter = fastify.passwords.retryAfterSeconds()
    if (retryAfter !== undefined) return reply.header('retry-after', retryAfter).outcome('busy')

    const taken = await fastify.codes.take(mobile, code)
    if (taken === undefined) return reply.outcome('wrong_code')

    const passwordHash = await hashOrPutBack(password, taken, reply)
    const userId = await fastify.users.insert(mobile, passwordHash)
    if (userId === undefined) return reply.outcome('mobile_registered')

    const user = { user_id: userId, name: mobile, mobile }
    const session = await fastify.sessions.start(request, reply, user)
    return reply.outcome('registered', { ...user, session })
  }

  /** The code of a client that has gone while its work was waiting goes back, and so does that of a hash that failed. */
  async function hashOrPutBack(password: string, taken: TakenCode, reply: FastifyReply): Promise<string> {
    try {
      return await fastify.passwords.hash(password, reply.raw)
    } catch (error) {
      await fastify.codes
        .putBack(taken)
        .catch((err) => reply.log.error({ reqId: reply.request.id, err }, 'a code could not be put back'))
      throw error
    }
  }
}
