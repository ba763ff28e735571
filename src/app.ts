import Fastify, { type FastifyInstance, type FastifyPluginAsync } from 'fastify'
import fp from 'fastify-plugin'
import type { DestinationStream } from 'pino'
import { createCodes } from './codes/codes.js'
import { sendCodeRoute } from './codes/send-code.js'
import { createSms } from './codes/sms.js'
import { type Config, limitsTurnedOff } from './config/config.js'
import { startDelivery } from './events/delivery.js'
import { badRequests } from './http/bad-requests.js'
import { connections } from './http/connections.js'
import { forwardedFor } from './http/forwarded-for.js'
import { healthRoutes, StoreChecks } from './http/health.js'
import { InFlight } from './http/in-flight.js'
import { lifecycle } from './http/lifecycle.js'
import { requireAddress } from './http/network.js'
import { openapi } from './http/openapi.js'
import { replies } from './http/replies.js'
import { replyHeaders } from './http/reply-headers.js'
import { serverOptions } from './http/server-options.js'
import { strictJson } from './http/strict-json.js'
import { createPasswords } from './passwords/passwords.js'
import { sessionRoutes } from './sessions/routes.js'
import { createSessions } from './sessions/sessions.js'
import { openPostgres } from './stores/postgres.js'
import { createRateLimits, limitNames } from './stores/rate-limits.js'
import { openRedis } from './stores/redis.js'
import { serializers } from './telemetry/log.js'
import { createMetrics, metricsServer } from './telemetry/metrics.js'
import type { Observer } from './telemetry/observer.js'
import { deleteAccountRoute } from './users/delete-account.js'
import { Devices } from './users/devices.js'
import { logInRoute } from './users/log-in.js'
import { resetPasswordRoute } from './users/reset-password.js'
import { signUpRoute } from './users/sign-up.js'
import { createUsers } from './users/users.js'

/** What the routes need, in one decorator, so that it is in nobody's way. */
export type MobileSignup = Awaited<ReturnType<typeof createCapabilities>>

declare module 'fastify' {
  interface FastifyInstance {
    mobileSignup: MobileSignup
  }
}

export interface BuildOptions {
  /** Receives the log as JSON lines. By default it goes to standard output. */
  logStream?: DestinationStream
}

export interface SignUpOptions {
  config: Config
}

/**
 * The routes with everything that they need, for any Fastify 5 application: `register(signUp, { prefix, config })`. Its
 * error handler, validator and stores do not leave its scope.
 */
export const signUp: FastifyPluginAsync<SignUpOptions> = async (fastify, { config }) => {
  // The host's logger may print every field of an error.
  fastify.log = fastify.log.child({}, { serializers })
  fastify.addHook('onRoute', (route) => {
    route.logSerializers = { ...route.logSerializers, ...serializers }
  })
  await fastify.register(replies, { config })
  await fastify.register(strictJson)
  await fastify.register(capabilities, { config })
  await fastify.register(routes, { config })
}

const capabilities = fp<SignUpOptions & { observer?: Observer | undefined }>(
  async (fastify, { config, observer }) => {
    fastify.decorate('mobileSignup', await createCapabilities(fastify, config, observer))
  },
  { fastify: '5.x', name: 'mobile-signup' }
)

async function createCapabilities(fastify: FastifyInstance, config: Config, observer: Observer | undefined) {
  const postgres = await openPostgres(fastify, config, observer)
  const redis = await openRedis(fastify, config, observer)
  const rateLimits = createRateLimits(redis, observer)
  /** Requests whose work a shutdown finishes, also when their client has disconnected. */
  const inFlight = new InFlight()
  const codes = createCodes(config, redis, rateLimits, inFlight, observer)
  const passwords = await createPasswords(fastify, config, observer)
  const { eventsWebhookUrl } = config
  const events = eventsWebhookUrl === undefined ? undefined : startDelivery(fastify, eventsWebhookUrl, config, postgres)
  const users = createUsers(postgres, fastify.log, events)
  const devices = new Devices(config)
  const sessions = await createSessions(fastify, config, redis, users.beginSessionEpoch)
  const sms = config.sms ? createSms(config, fastify.log, observer) : undefined
  // onClose hooks run in reverse order. So requests in flight end before anything that they use is closed.
  fastify.addHook('onClose', () => inFlight.drain())
  return { events, postgres, redis, rateLimits, codes, passwords, users, devices, sessions, sms, inFlight }
}

const routes: FastifyPluginAsync<SignUpOptions> = async (fastify, { config }) => {
  fastify.addHook('onRequest', requireAddress)
  await fastify.register(signUpRoute, { config })
  await fastify.register(resetPasswordRoute, { config })
  await fastify.register(logInRoute, { config })
  await fastify.register(deleteAccountRoute, { config })
  await fastify.register(sessionRoutes)
  const { sms } = fastify.mobileSignup
  if (sms) await fastify.register(sendCodeRoute, { config, sms })
}

/**
 * Builds the service. `listen` and `inject` make it ready; until then it takes more routes.
 *
 * @throws if a store does not answer, no password can be hashed or a port is in use; nothing is left open then
 */
export async function buildApp(config: Config, options: BuildOptions = {}): Promise<FastifyInstance> {
  const app = Fastify(serverOptions(config, options.logStream))
  try {
    await registerService(app, config)
  } catch (error) {
    await app.close()
    throw error
  }
  return app
}

async function registerService(app: FastifyInstance, config: Config): Promise<void> {
  const metrics = config.metricsPort === undefined ? undefined : createMetrics(limitNames)

  const turnedOff = limitsTurnedOff(config)
  if (config.production && turnedOff.length > 0)
    app.log.warn({ limits: turnedOff }, 'limits on strangers are turned off')

  await app.register(connections)
  await app.register(replyHeaders)
  await app.register(replies, { config })
  await app.register(badRequests)
  await app.register(forwardedFor, { config })
  await app.register(strictJson)
  await app.register(lifecycle)
  await app.register(capabilities, { config, observer: metrics?.observer })
  await app.register(openapi, { config })
  const storeChecks = new StoreChecks(checksOf(app))
  const sources = { ...app.mobileSignup, storeChecks }
  if (metrics) await app.register(metricsServer, { config, metrics, sources })
  await app.register(routes, { prefix: config.apiPrefix, config })
  await app.register(healthRoutes, { storeChecks, hasSchema: () => app.mobileSignup.postgres.hasSchema })
}

/** Each check tests whether its store accepts writes, because a replica also answers reads. */
const checksOf = ({ mobileSignup: { postgres, redis } }: FastifyInstance) => ({
  Postgres: () => postgres.checkWritable(),
  Redis: () => redis.run((client) => client.set('mobile_signup:health', '', 'PX', 1_000))
})
