import { once } from 'node:events'
import { createServer } from 'node:http'
import fp from 'fastify-plugin'
import { Counter, collectDefaultMetrics, Gauge, Histogram, Registry } from 'prom-client'
import type { Config } from '../config/config.js'
import type { Observer, StoreName } from './observer.js'

declare module 'fastify' {
  interface FastifyInstance {
    /** Where Prometheus scrapes. Absent unless `METRICS_PORT` is set. */
    metricsUrl?: string
  }
}

/** Upper bounds in seconds. */
const buckets = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10]

/** The label of requests without a route. Their URL may contain anything. */
const noRoute = 'none'

/** Values that are read at each scrape. */
interface MetricsSources {
  readonly passwords: { readonly queueLength: number; readonly expectedWaitMs: number }
  readonly postgres: { connections(): { total: number; idle: number; waiting: number } }
  readonly storeChecks: { readonly names: readonly string[]; failing(): Promise<string[]> }
}

/** The registry of all metrics, those of the process included. It observes the capabilities. */
export class Metrics implements Observer {
  readonly registry = new Registry()
  private readonly registers = [this.registry]

  private readonly requests = new Histogram({
    name: 'mobile_signup_request_duration_seconds',
    help: 'Time from a request to its answer; _count is the number of answered requests',
    labelNames: ['method', 'route', 'outcome'] as const,
    buckets,
    registers: this.registers
  })
  private readonly hashWaits = new Histogram({
    name: 'mobile_signup_hash_wait_seconds',
    help: "Time in the hash queue, until libuv's pool gets the job",
    buckets,
    registers: this.registers
  })
  private readonly hashes = new Histogram({
    name: 'mobile_signup_hash_duration_seconds',
    help: "Time of a hash or a verification in libuv's pool",
    buckets,
    registers: this.registers
  })
  private readonly roundTrips = new Histogram({
    name: 'mobile_signup_store_round_trip_seconds',
    help: 'Time of a round trip to a store, failures included; commands sent together are one round trip',
    labelNames: ['store'] as const,
    buckets,
    registers: this.registers
  })
  private readonly storeErrors = new Counter({
    name: 'mobile_signup_store_errors_total',
    help: 'Failed round trips',
    labelNames: ['store'] as const,
    registers: this.registers
  })
  private readonly codesSent = new Counter({
    name: 'mobile_signup_codes_sent_total',
    help: 'Messages with a code that the SMS gateway has accepted, or may have',
    registers: this.registers
  })
  private readonly codesUsed = new Counter({
    name: 'mobile_signup_codes_used_total',
    help: 'Sent codes that completed a sign-up or a password reset',
    registers: this.registers
  })
  private readonly limitRefusals = new Counter({
    name: 'mobile_signup_limit_refusals_total',
    help: 'Requests that were refused with 429, by the limit that keeps them waiting longest',
    labelNames: ['limit'] as const,
    registers: this.registers
  })

  /** @param limitNames the labels of the limits, whose series begin with 0 */
  constructor(limitNames: readonly string[]) {
    collectDefaultMetrics({ register: this.registry })
    for (const store of ['postgres', 'redis'] as const) this.storeErrors.inc({ store }, 0)
    for (const limit of limitNames) this.limitRefusals.inc({ limit }, 0)
  }

  /** Prepares the count of failures of a route. `increase()` of Prometheus does not see how a series begins. */
  addRoute(method: string, route: string): void {
    this.requests.zero({ method, route, outcome: 'internal_error' })
  }

  onRequest(labels: { method: string; route: string; outcome: string }, durationMs: number): void {
    this.requests.observe(labels, durationMs / 1_000)
  }

  onRoundTrip(store: StoreName, durationMs: number, hasFailed: boolean): void {
    this.roundTrips.observe({ store }, durationMs / 1_000)
    if (hasFailed) this.storeErrors.inc({ store })
  }

  onHash(waitMs: number, durationMs: number): void {
    this.hashWaits.observe(waitMs / 1_000)
    this.hashes.observe(durationMs / 1_000)
  }

  onCodeSent(): void {
    this.codesSent.inc()
  }

  onCodeUsed(): void {
    this.codesUsed.inc()
  }

  onLimitReached(limit: string): void {
    this.limitRefusals.inc({ limit })
  }

  /** Adds the gauges of the service. */
  addSources({ passwords, postgres, storeChecks }: MetricsSources): void {
    const { registers } = this
    new Gauge({
      name: 'mobile_signup_hash_queue_length',
      help: 'Passwords that wait for a thread',
      registers,
      collect() {
        this.set(passwords.queueLength)
      }
    })
    new Gauge({
      name: 'mobile_signup_hash_expected_wait_seconds',
      help: 'How long a new sign-up would wait for a thread; above HASH_MAX_WAIT_MS it is refused',
      registers,
      collect() {
        this.set(passwords.expectedWaitMs / 1_000)
      }
    })
    new Gauge({
      name: 'mobile_signup_postgres_connections',
      help: 'Connections of the pool by state; waiting: statements that wait for a connection',
      labelNames: ['state'] as const,
      registers,
      collect() {
        const { total, idle, waiting } = postgres.connections()
        this.set({ state: 'busy' }, total - idle)
        this.set({ state: 'idle' }, idle)
        this.set({ state: 'waiting' }, waiting)
      }
    })
    // Last, because the check of Postgres takes a connection.
    new Gauge({
      name: 'mobile_signup_store_available',
      help: 'Whether a store answers and can be written; checked at each scrape',
      labelNames: ['store'] as const,
      registers,
      async collect() {
        const failing = await storeChecks.failing()
        for (const name of storeChecks.names) this.set({ store: name.toLowerCase() }, failing.includes(name) ? 0 : 1)
      }
    })
  }
}

/** Counts requests, and serves `GET /metrics` on a port of its own, which the gateway does not expose. */
export const metricsServer = fp<{ config: Config; metrics: Metrics; sources: MetricsSources }>(
  async (fastify, { config: { host, metricsPort }, metrics, sources }) => {
    const { registry } = metrics
    metrics.addSources(sources)
    fastify.addHook('onRoute', ({ method, url, config }) => {
      if (!config?.isProbe) for (const name of [method].flat()) metrics.addRoute(name, url)
    })
    fastify.addHook('onResponse', (request, reply, done) => {
      const { config, url: route = noRoute } = request.routeOptions
      if (!config.isProbe) {
        metrics.onRequest({ method: request.method, route, outcome: reply.outcomeName ?? 'none' }, reply.elapsedTime)
      }
      done()
    })

    const server = createServer(async ({ url }, response) => {
      if (url !== '/metrics') return response.writeHead(404).end()
      return response.setHeader('content-type', registry.contentType).end(await registry.metrics())
    })
    // As src/server.ts does it. During the registration, so that a port in use stops the start before the service listens.
    await once(server.listen(metricsPort, host === '::' ? '' : host), 'listening')
    // onClose runs after the last request is answered, so a shutdown can be observed.
    fastify.addHook('onClose', async () => {
      server.closeAllConnections()
      await new Promise((resolve) => server.close(resolve))
    })
    const address = server.address()
    const port = typeof address === 'object' ? address?.port : undefined
    const url = `http://${host.includes(':') ? `[${host}]` : host}:${port}/metrics`
    fastify.log.info(`Metrics at ${url}`)
    fastify.decorate('metricsUrl', url)
  },
  { fastify: '5.x', name: 'metrics-server', dependencies: ['replies'] }
)
