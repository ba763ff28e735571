import { randomUUID } from 'node:crypto'
import { type Static, Type } from '@sinclair/typebox'
import type { FastifyPluginAsync, FastifyReply, FastifyRequest } from 'fastify'
import { presentedMaxLength } from '../codes/code-format.js'
import { type Config, passwordMax } from '../config/config.js'
import { bodyOutcomes, mobileField, repliesWith } from '../http/schemas.js'
import { Refusal } from '../outcomes.js'
import { QueueFull } from '../passwords/hash-queue.js'
import { LoggedInData } from '../sessions/schemas.js'
import { bugLogger } from '../stores/store-unavailable.js'
import { createLogInByCode } from './log-in-by-code.js'
import { forgetFailures, LoginPlaces, loginLimits } from './login-limits.js'
import { ticketField } from './schemas.js'
import type { User } from './users.js'

/** One of two proofs. Null and "" count as absent. */
const proofs = {
  password: { type: ['string', 'null'], format: 'well-formed', examples: ['correct horse'] },
  sms_code: { type: ['string', 'null'], format: 'well-formed', maxLength: presentedMaxLength }
}
const requires = (name: keyof typeof proofs) => ({
  required: [name],
  properties: { [name]: { not: { enum: [null, ''] } } }
})

const LoginBody = Type.Object(
  {
    mobile: mobileField,
    password: Type.Optional(Type.Unsafe<string | null>(proofs.password)),
    sms_code: Type.Optional(Type.Unsafe<string | null>(proofs.sms_code)),
    ticket: Type.Optional(ticketField)
  },
  {
    examples: [{ mobile: '13812345678', password: 'correct horse' }],
    anyOf: [requires('password'), requires('sms_code')],
    not: { allOf: [requires('password'), requires('sms_code')] }
  }
)

type LoginRequest = FastifyRequest<{ Body: Static<typeof LoginBody> }>

/** POST /sessions, with a password or a code. An unknown mobile takes as long as a wrong password and gets the same answer. */
export const logInRoute: FastifyPluginAsync<{ config: Config }> = async (fastify, { config }) => {
  const { devices, inFlight, passwords, rateLimits, sessions, users } = fastify.mobileSignup
  const places = new LoginPlaces()
  const logInByCode = createLogInByCode(fastify, config)

  fastify.route({
    method: 'POST',
    url: '/sessions',
    schema: {
      tags: ['session'],
      operationId: 'logIn',
      summary: 'Log in with a password, or with a code',
      description: 'With the device cookie of an earlier success for the mobile, failures count for that device alone.',
      body: LoginBody,
      response: repliesWith(LoggedInData)
    },
    config: {
      outcomes: [...bodyOutcomes, 'logged_in', 'password_length', 'wrong_login', 'wrong_code', 'too_many_requests'],
      data: { logged_in: LoggedInData }
    },
    handler(request: LoginRequest, reply: FastifyReply) {
      const { mobile, password, sms_code, ticket } = request.body
      return inFlight.track(
        sms_code ? logInByCode(request, reply, { mobile, sms_code, ticket }) : logIn(request, reply, password ?? '')
      )
    }
  })

  async function logIn(request: LoginRequest, reply: FastifyReply, password: string) {
    const { mobile } = request.body
    // In code points; JSON Schema's maxLength would be another outcome.
    if ([...password].length > passwordMax) return reply.outcome('password_length')

    const deviceId = devices.idOf(request, mobile)
    const limits = loginLimits(config, mobile, request.ip, deviceId)
    const unit = randomUUID()
    // If it fails, the try counts until the window ends.
    const logUncounted = bugLogger(request.log, 'the count of a login could not be changed')
    const refund = () => rateLimits.refund(limits.counted, unit).catch(logUncounted)

    // Refuse before any store is touched, if the hash queue is too long.
    passwords.queue.admit(reply.raw)
    const giveBackPlace = places.take(mobile, request.ip, deviceId)
    let user: User | undefined
    try {
      // Every try counts before the password is verified, so parallel guesses cannot slip through.
      const retryAfterSeconds = await rateLimits.consume(limits.counted, unit)
      if (retryAfterSeconds > 0) return reply.outcome('too_many_requests', { retryAfterSeconds })
      user = await findVerifiedUser(mobile, password, reply)
    } catch (error) {
      // A failure or a refusal of the service is no failed login.
      await refund()
      throw error
    } finally {
      giveBackPlace()
    }
    if (user === undefined) {
      // Not awaited: it does not delay the answer. A shutdown waits for it.
      if (deviceId === undefined) inFlight.track(rateLimits.markFailed(limits.clearedByReset, unit).catch(logUncounted))
      return reply.outcome('wrong_login')
    }

    const sessionUser = { user_id: user.id, name: user.name, mobile }
    const [isLoggedIn] = await Promise.all([
      sessions.start(request, reply, sessionUser, user.sessionEpoch),
      refund(),
      forgetFailures(rateLimits, limits.clearedBySuccess, request.log)
    ])
    // A reset or a logout everywhere overtook this login. Or Postgres has lost one in a failover: then only a new reset helps.
    if (!isLoggedIn) return reply.outcome('wrong_login')
    devices.remember(reply, mobile)

    // Not awaited either.
    if (passwords.isOutdated(user.passwordHash)) {
      inFlight.track(rehash(user, request, password, deviceId))
    }
    return reply.outcome('logged_in', { data: { ...sessionUser, session: true } })
  }

  /** An unknown mobile takes as long as a wrong password. */
  async function findVerifiedUser(mobile: string, password: string, reply: FastifyReply) {
    const user = await users.find(mobile)
    // Again, now that it joins the queue: the wait may have grown, and no code would be lost.
    passwords.queue.admit(reply.raw)
    return (await passwords.verify(user?.passwordHash, password, reply.raw)) ? user : undefined
  }

  /** Replaces a hash that has outdated parameters, unless it has been replaced since, or a login would be refused now. */
  async function rehash(
    { passwordHash }: User,
    request: LoginRequest,
    password: string,
    deviceId?: string
  ): Promise<void> {
    const { mobile } = request.body
    let giveBackPlace: (() => void) | undefined
    try {
      passwords.queue.admit()
      giveBackPlace = places.take(mobile, request.ip, deviceId)
      await users.replaceHash(mobile, passwordHash, await passwords.hash(password))
    } catch (err) {
      const isRefused = err instanceof QueueFull || err instanceof Refusal
      if (!isRefused) bugLogger(request.log, 'an outdated hash could not be replaced')(err)
    } finally {
      giveBackPlace?.()
    }
  }
}
