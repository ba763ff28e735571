import { type Static, Type } from '@sinclair/typebox'
import type { FastifyPluginAsync, FastifyReply, FastifyRequest } from 'fastify'
import { bodyMaxBytes, type Config } from '../config.js'
import { passwordFault } from '../password-policy.js'
import type { Attempt, CompletedSignUp } from '../plugins/codes.js'
import type { SessionUser } from '../plugins/sessions.js'
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
    const { mobile, sms_code: code } = request.body
    const fault = passwordFault(request.body, passwordMin)
    if (fault !== undefined) return reply.outcome(fault)

    const retryAfter = fastify.passwords.retryAfterSeconds()
    if (retryAfter !== undefined) return reply.header('retry-after', retryAfter).outcome('busy')

    const take = await fastify.codes.take(mobile, code)
    switch (take.state) {
      case 'taken':
        return register(request, reply, take)
      case 'done':
        return replay(request, reply, take)
      case 'in_progress':
        return reply.outcome('busy')
      case 'wrong':
        return reply.outcome('wrong_code')
    }
  }

  async function register(request: SignUpRequest, reply: FastifyReply, attempt: Attempt) {
    const user = await storeOrPutBack(request.body.password, attempt, reply)
    if (user === undefined) {
      await fastify.codes.spend(attempt).catch((err) => logLeft(reply, err))
      return reply.outcome('mobile_registered')
    }
    // In one trip. Without the second a retry has to wait for the lease's end, and then finds the row.
    const [session] = await Promise.all([
      fastify.sessions.start(request, reply, user),
      fastify.codes.complete(attempt, user.user_id).catch((err) => logLeft(reply, err))
    ])
    return reply.outcome('registered', { ...user, session })
  }

  /**
   * The attempt's user in Postgres, by this attempt or by an earlier one whose outcome nobody knew; undefined if the
   * mobile is registered otherwise. The code goes back when a fault of ours, or the departure of its client, ends this.
   */
  async function storeOrPutBack(
    password: string,
    attempt: Attempt,
    reply: FastifyReply
  ): Promise<SessionUser | undefined> {
    const { mobile, again } = attempt
    let mayBeRegistered = again
    try {
      const passwordHash = await fastify.passwords.hash(password, reply.raw)
      mayBeRegistered = true
      const userId = await fastify.users.insert(mobile, passwordHash)
      if (userId !== undefined) return { user_id: userId, name: mobile, mobile }
      return again ? await findVerified(mobile, password, reply) : undefined
    } catch (error) {
      await fastify.codes.putBack(attempt, mayBeRegistered).catch((err) => logLeft(reply, err))
      throw error
    }
  }

  /** Answers the repeated request of a sign-up that is done. */
  async function replay(request: SignUpRequest, reply: FastifyReply, { userId, takenAt }: CompletedSignUp) {
    const { mobile, password } = request.body
    const user = await findVerified(mobile, password, reply)
    if (user?.user_id !== userId) {
      await fastify.codes.countWrongPassword(mobile, takenAt)
      return reply.outcome('mobile_registered')
    }
    const session = await fastify.sessions.start(request, reply, user)
    return reply.header('idempotent-replayed', 'true').outcome('registered', { ...user, session })
  }

  /** The user of a mobile if the password is theirs. */
  async function findVerified(mobile: string, password: string, reply: FastifyReply): Promise<SessionUser | undefined> {
    const user = await fastify.users.find(mobile)
    if (user === undefined) return undefined
    const matches = await fastify.passwords.verify(user.passwordHash, password, reply.raw)
    return matches ? { user_id: user.id, name: user.name, mobile } : undefined
  }
}

/** The marker of an attempt is left as it was: it ends with its lease. */
function logLeft({ log, request }: FastifyReply, err: unknown): void {
  log.error({ reqId: request.id, err }, 'an attempt could not be ended in Redis')
}
