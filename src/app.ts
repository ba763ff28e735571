import Fastify, { type FastifyInstance, type FastifyPluginAsync } from 'fastify'
import fp from 'fastify-plugin'
import type { DestinationStream } from 'pino'
import { codes } from './codes/codes.js'
import { codeRoutes } from './codes/routes.js'
import { sms } from './codes/sms.js'
import type { Config } from './config/config.js'
import { badRequests } from './http/bad-requests.js'
import { forwardedFor } from './http/forwarded-for.js'
import { healthRoutes, StoreChecks } from './http/health.js'
import { inFlight } from './http/in-flight.js'
import { openapi } from './http/openapi.js'
import { replies } from './http/replies.js'
import { replyHeaders } from './http/reply-headers.js'
import { serverOptions } from './http/server-options.js'
import { shutdown } from './http/shutdown.js'
import { startUp } from './http/start-up.js'
import { strictJson } from './http/strict-json.js'
import { passwords } from './passwords/passwords.js'
import { sessionRoutes } from './sessions/routes.js'
import { sessions } from './sessions/sessions.js'
import { postgres } from './stores/postgres.js'
import { limitNames, rateLimits } from './stores/rate-limits.js'
import { redis } from './stores/redis.js'
import { serializers } from './telemetry/log.js'
import { Metrics, type MetricsSources, metricsServer } from './telemetry/metrics.js'
import type { Observer } from './telemetry/observer.js'
import { logInRoute } from './users/log-in.js'
import { resetPasswordRoute } from './users/reset-password.js'
import { signUpRoute } from './users/sign-up.js'
import { users } from './users/users.js'

/** The capabilities that a test may replace by a fake. */
interface Overrides {
  passwords?: typeof passwords
}

export interface BuildOptions {
  /** Receives the log as JSON lines. By default it goes to standard output. */
  logStream?: DestinationStream
  overrides?: Overrides
}

export interface SignUpOptions {
  config: Config
  /**
   * Whether the event loop may sleep for some milliseconds while passwords are queued. It makes sign-ups cheaper, but
   * everything else in the process waits, too. `false` by default.
   */
  coalesceEvents?: boolean
}

interface CapabilityOptions {
  config: Config
  coalesceEvents: boolean
  observer?: Observer | undefined
  overrides?: Overrides | undefined
}

/**
 * The routes with everything that they need, for any Fastify 5 application: `register(signUp, { prefix, config })`. Its
 * error handler, validator and stores do not leave its scope.
 */
export const signUp: FastifyPluginAsync<SignUpOptions> = async (fastify, { config, coalesceEvents = false }) => {
  // The host's logger may print every field of an error.
  fastify.log = fastify.log.child({}, { serializers })
  fastify.addHook('onRoute', (route) => {
    route.logSerializers = { ...route.logSerializers, ...serializers }
  })
  await fastify.register(replies, { config })
  await fastify.register(strictJson)
  await fastify.register(capabilities, { config, coalesceEvents })
  await fastify.register(routes, { config })
}

/** What the routes need, as decorators. */
const capabilities = fp<CapabilityOptions>(async (fastify, { config, coalesceEvents, observer, overrides }) => {
  await fastify.register(postgres, { config, observer })
  await fastify.register(redis, { config, observer })
  await fastify.register(rateLimits, { observer })
  await fastify.register(codes, { config, observer })
  await fastify.register(overrides?.passwords ?? passwords, { config, observer, coalesceEvents })
  await fastify.register(users)
  await fastify.register(sessions, {
    config,
    beginEpoch: ({ mobile, user_id }) => fastify.users.beginSessionEpoch(mobile, user_id)
  })
  if (config.sms) await fastify.register(sms, { config, observer })
  // Last: onClose hooks run in reverse order, so requests in flight are drained before anything that they use is closed.
  await fastify.register(inFlight)
})

const routes: FastifyPluginAsync<{ config: Config }> = async (fastify, { config }) => {
  await fastify.register(signUpRoute, { config })
  await fastify.register(resetPasswordRoute, { config })
  await fastify.register(logInRoute, { config })
  await fastify.register(sessionRoutes)
  if (config.sms) await fastify.register(codeRoutes, { config })
}

/**
 * Builds the service. `listen` and `inject` make it ready; until then it takes more routes.
 *
 * @throws if a store does not answer, a hash thread cannot start or a port is in use; nothing is left open then
 */
export async function buildApp(config: Config, options: BuildOptions = {}): Promise<FastifyInstance> {
  const app = Fastify(serverOptions(config, options.logStream))
  try {
    await registerService(app, config, options)
  } catch (error) {
    await app.close()
    throw error
  }
  return app
}

async function registerService(app: FastifyInstance, config: Config, { overrides }: BuildOptions): Promise<void> {
  const metrics = config.metricsPort === undefined ? undefined : new Metrics(limitNames)

  await app.register(replyHeaders)
  await app.register(forwardedFor)
  await app.register(replies, { config })
  await app.register(strictJson)
  await app.register(startUp)
  await app.register(shutdown)
  await app.register(badRequests, { config })
  await app.register(capabilities, {
    config,
    coalesceEvents: true,
    observer: metrics,
    overrides
  })
  await app.register(openapi, { config })
  const storeChecks = new StoreChecks(checksOf(app))
  if (metrics) await app.register(metricsServer, { config, metrics, sources: metricsSources(app, storeChecks) })
  await app.register(routes, { prefix: config.apiPrefix, config })
  await app.register(healthRoutes, { storeChecks, ownFailure: () => ownFailure(app) })
}

const metricsSources = ({ passwords, postgres }: FastifyInstance, storeChecks: StoreChecks): MetricsSources => ({
  hashQueueLength: () => passwords.queueLength,
  hashExpectedWaitMs: () => passwords.expectedWaitMs,
  postgresConnections: () => postgres.connections(),
  stores: storeChecks.names,
  failingStores: () => storeChecks.failing()
})

/** Each check tests whether its store accepts writes, because a replica also answers reads. */
const checksOf = ({ postgres, withRedis }: FastifyInstance) => ({
  Postgres: () => postgres.checkWritable(),
  Redis: () => withRedis((redis) => redis.set('mobile_signup:health', '', 'PX', 1_000))
})

function ownFailure({ passwords, shutdown, startUp }: FastifyInstance): string | undefined {
  if (shutdown.isAnnounced) return 'shutting down'
  if (!startUp.isComplete) return 'starting'
  return passwords.isAvailable ? undefined : 'hash threads'
}
