import { once } from 'node:events'
import { createServer } from 'node:http'
import fp from 'fastify-plugin'
import { Counter, collectDefaultMetrics, Gauge, Histogram, Registry } from 'prom-client'
import type { Config } from '../config/config.js'
import type { EventBacklog, Observer } from './observer.js'

declare module 'fastify' {
  interface FastifyInstance {
    /** Where Prometheus scrapes. Absent unless `METRICS_PORT` is set. */
    metricsUrl?: string
  }
}

/** Upper bounds in seconds. */
const buckets = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10]

/** Values that are read at each scrape. */
interface MetricsSources {
  readonly passwords: { readonly queue: { readonly queueLength: number; readonly expectedWaitMs: number } }
  readonly postgres: { connections(): { total: number; idle: number; waiting: number } }
  /** Undefined without `EVENTS_WEBHOOK_URL`. */
  readonly events: { readBacklog(): Promise<EventBacklog> } | undefined
  readonly storeChecks: { readonly names: readonly string[]; failing(): Promise<string[]> }
}

export type Metrics = ReturnType<typeof createMetrics>

/**
 * Creates all metrics, those of the process included.
 *
 * @param limitNames the labels of the limits, whose series begin with 0
 */
export function createMetrics(limitNames: readonly string[]) {
  const registry = new Registry()
  collectDefaultMetrics({ register: registry })
  const described = <Label extends string>(name: string, help: string, ...labelNames: Label[]) => {
    return { name: `mobile_signup_${name}`, help, labelNames, registers: [registry], buckets }
  }

  function addGauge<Label extends string>(
    name: string,
    help: string,
    labelNames: Label[],
    read: (gauge: Gauge<Label>) => void | Promise<void>
  ): void {
    const gauge: Gauge<Label> = new Gauge({ ...described(name, help, ...labelNames), collect: () => read(gauge) })
  }

  const answered = 'Time from a request to its answer; _count is the number of answered requests'
  const requests = new Histogram(described('request_duration_seconds', answered, 'method', 'route', 'outcome'))
  const hashWaits = new Histogram(
    described('hash_wait_seconds', "Time in the hash queue, until libuv's pool gets the job")
  )
  const hashes = new Histogram(described('hash_duration_seconds', "Time of a hash or a verification in libuv's pool"))
  const tripTime = 'Time of a Redis command or a Postgres statement, failures included'
  const roundTrips = new Histogram(described('store_round_trip_seconds', tripTime, 'store'))
  const storeErrors = new Counter(described('store_errors_total', 'Failed round trips', 'store'))
  for (const store of ['postgres', 'redis'] as const) storeErrors.inc({ store }, 0)
  const sent = 'Messages with a code that the SMS gateway has accepted, or may have'
  const codesSent = new Counter(described('codes_sent_total', sent))
  const used = 'Sent codes that completed a request'
  const codesUsed = new Counter(described('codes_used_total', used))
  const refused = 'Requests that were refused with 429, by the limit that keeps them waiting longest'
  const limitRefusals = new Counter(described('limit_refusals_total', refused, 'limit'))
  for (const limit of limitNames) limitRefusals.inc({ limit }, 0)

  const observer: Observer = {
    onRoundTrip(store, durationMs, hasFailed) {
      roundTrips.observe({ store }, durationMs / 1_000)
      if (hasFailed) storeErrors.inc({ store })
    },
    onHash(waitMs, durationMs) {
      hashWaits.observe(waitMs / 1_000)
      hashes.observe(durationMs / 1_000)
    },
    onCodeSent: () => codesSent.inc(),
    onCodeUsed: () => codesUsed.inc(),
    onLimitReached: (limit) => limitRefusals.inc({ limit })
  }

  return {
    registry,
    requests,
    observer,
    /** Adds the gauges of the service. A scrape reads them in this order. */
    addSources({ passwords: { queue }, postgres, events, storeChecks }: MetricsSources): void {
      addGauge('hash_queue_length', 'Passwords that wait for a thread', [], (gauge) => gauge.set(queue.queueLength))
      const wait = 'How long a new sign-up would wait for a thread; above HASH_MAX_WAIT_MS it is refused'
      addGauge('hash_expected_wait_seconds', wait, [], (gauge) => gauge.set(queue.expectedWaitMs / 1_000))
      const states = 'Connections of the pool by state; waiting: statements that wait for a connection'
      addGauge('postgres_connections', states, ['state'], (gauge) => {
        const { total, idle, waiting } = postgres.connections()
        for (const [state, count] of Object.entries({ busy: total - idle, idle, waiting })) gauge.set({ state }, count)
      })
      if (events) {
        /** The first gauge reads it at each scrape, and the second uses it. */
        let backlog: Promise<EventBacklog> | undefined
        const eventStates = 'Events of users by state: waiting; undeliverable after three days'
        addGauge('events', eventStates, ['state'], async (gauge) => {
          backlog = events.readBacklog()
          const { waiting, undeliverable } = await backlog
          for (const [state, count] of Object.entries({ waiting, undeliverable })) gauge.set({ state }, count)
        })
        addGauge('events_oldest_age_seconds', 'Age of the oldest event that waits', [], async (gauge) =>
          gauge.set((await backlog)?.oldestSeconds ?? Number.NaN)
        )
      }
      // Last, because the check of Postgres takes a connection.
      const available = 'Whether a store answers and can be written; checked at each scrape'
      addGauge('store_available', available, ['store'], async (gauge) => {
        const failing = await storeChecks.failing()
        for (const name of storeChecks.names) gauge.set({ store: name.toLowerCase() }, failing.includes(name) ? 0 : 1)
      })
    }
  }
}

/** Counts requests, and serves `GET /metrics` on a port of its own, which the gateway does not expose. */
export const metricsServer = fp<{ config: Config; metrics: Metrics; sources: MetricsSources }>(
  async (fastify, { config: { host, metricsPort }, metrics, sources }) => {
    const { registry, requests } = metrics
    metrics.addSources(sources)
    fastify.addHook('onRoute', ({ method, url, config }) => {
      // `increase()` of Prometheus does not see how a series begins.
      const outcome = 'internal_error'
      if (!config?.isProbe) for (const name of [method].flat()) requests.zero({ method: name, route: url, outcome })
    })
    fastify.addHook('onResponse', (request, reply, done) => {
      // A request without a route has a URL that may contain anything.
      const { config, url: route = 'none' } = request.routeOptions
      const labels = { method: request.method, route, outcome: reply.outcomeName ?? 'none' }
      if (!config.isProbe) requests.observe(labels, reply.elapsedTime / 1_000)
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
