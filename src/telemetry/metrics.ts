import { once } from 'node:events'
import { createServer } from 'node:http'
import { monitorEventLoopDelay } from 'node:perf_hooks'
import fp from 'fastify-plugin'
import { Counter, Gauge, Histogram, Registry } from 'prom-client'
import type { Config } from '../config/config.js'

type Store = 'postgres' | 'redis'

interface Metrics {
  /** Where they are scraped. */
  readonly url: string
  /** Times a round trip to a store, and counts its failure. */
  observeRoundTrip(store: Store, trip: Promise<unknown>): void
  /** @param waitMs in the queue, before a thread began */
  observeHash(waitMs: number, hashMs: number): void
}

declare module 'fastify' {
  interface FastifyInstance {
    /** Absent unless `METRICS_PORT` is set. */
    metrics?: Metrics
  }
}

/** Seconds. */
const buckets = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10]

/** Of requests that no route takes; the URL may hold anything. */
const noRoute = 'none'

/** `GET /metrics` for Prometheus, on a port of its own, which is no business of the gateway's clients. */
export const metrics = fp<Pick<Config, 'host' | 'metricsPort'>>(
  async (fastify, { host, metricsPort }) => {
    const registry = new Registry()
    const registers = [registry]

    const durations = new Histogram({
      name: 'mobile_signup_request_duration_seconds',
      help: 'From a request to its answer; its _count is that of the answered requests',
      labelNames: ['method', 'route', 'outcome'] as const,
      buckets,
      registers
    })
    fastify.addHook('onResponse', (request, reply, done) => {
      const { config, url: route = noRoute } = request.routeOptions
      if (!config.probe) {
        const labels = { method: request.method, route, outcome: reply.outcomeName ?? 'none' }
        durations.observe(labels, reply.elapsedTime / 1_000)
      }
      done()
    })

    const hashWaits = new Histogram({
      name: 'mobile_signup_hash_wait_seconds',
      help: 'In the queue, until a thread begins',
      buckets,
      registers
    })
    const hashes = new Histogram({
      name: 'mobile_signup_hash_duration_seconds',
      help: 'A hash or a verification in its thread',
      buckets,
      registers
    })
    new Gauge({
      name: 'mobile_signup_hash_queue_length',
      help: 'Passwords that wait for a thread',
      registers,
      collect() {
        this.set(fastify.passwords.queueLength)
      }
    })
    new Gauge({
      name: 'mobile_signup_hash_expected_wait_seconds',
      help: 'What a sign-up would wait that came now; over HASH_MAX_WAIT_MS it is refused',
      registers,
      collect() {
        this.set(fastify.passwords.expectedWaitMs / 1_000)
      }
    })

    const perStore = { labelNames: ['store'] as const, registers }
    const trips = new Histogram({
      ...perStore,
      name: 'mobile_signup_store_round_trip_seconds',
      help: 'What a store was asked, alone or with more in one trip, failures included',
      buckets
    })
    const errors = new Counter({ ...perStore, name: 'mobile_signup_store_errors_total', help: 'Failed round trips' })
    for (const store of ['postgres', 'redis'] as const) errors.inc({ store }, 0)
    new Gauge({
      name: 'mobile_signup_postgres_connections',
      help: 'Connections of the pool, by state; waiting: what waits for one',
      labelNames: ['state'] as const,
      registers,
      collect() {
        const { total, idle, waiting } = fastify.poolUse()
        this.set({ state: 'busy' }, total - idle)
        this.set({ state: 'idle' }, idle)
        this.set({ state: 'waiting' }, waiting)
      }
    })

    // The names are those of prom-client's default metrics, whose look at every garbage collection took 8 % of the sign-ups
    // a second with the cheapest hash.
    new Counter({
      name: 'process_cpu_seconds_total',
      help: 'CPU time of all threads',
      registers,
      collect() {
        const { user, system } = process.cpuUsage()
        this.reset()
        this.inc((user + system) / 1e6)
      }
    })
    new Gauge({
      name: 'process_resident_memory_bytes',
      help: 'Resident memory',
      registers,
      collect() {
        this.set(process.memoryUsage.rss())
      }
    })
    const resolution = 20
    const delay = monitorEventLoopDelay({ resolution })
    delay.enable()
    fastify.addHook('onClose', async () => void delay.disable())
    new Gauge({
      name: 'nodejs_eventloop_lag_p99_seconds',
      help: 'By how much the event loop was late since the last scrape',
      registers,
      collect() {
        // Node counts the time between two looks, of which the resolution is meant.
        this.set(Math.max(0, delay.percentile(99) / 1e6 - resolution) / 1_000)
        delay.reset()
      }
    })

    const server = createServer(async ({ url }, response) => {
      if (url !== '/metrics') return response.writeHead(404).end()
      return response.setHeader('content-type', registry.contentType).end(await registry.metrics())
    })
    // Here, and not beside the service's own listen: a port that is taken is told before it serves anybody.
    await once(server.listen(metricsPort, host), 'listening')
    // After the last request has been answered, so that a shutdown can be watched.
    fastify.addHook('onClose', async () => {
      server.closeAllConnections()
      await new Promise((resolve) => server.close(resolve))
    })
    const address = server.address()
    const port = typeof address === 'object' ? address?.port : undefined
    const url = `http://${host.includes(':') ? `[${host}]` : host}:${port}/metrics`
    fastify.log.info(`Metrics at ${url}`)

    fastify.decorate('metrics', {
      url,
      observeRoundTrip(store, trip) {
        const startedAt = performance.now()
        const observe = () => trips.observe({ store }, (performance.now() - startedAt) / 1_000)
        trip.then(observe, () => {
          observe()
          errors.inc({ store })
        })
      },
      observeHash(waitMs, hashMs) {
        hashWaits.observe(waitMs / 1_000)
        hashes.observe(hashMs / 1_000)
      }
    } satisfies Metrics)
  },
  { fastify: '5.x', name: 'metrics', dependencies: ['envelope', 'postgres', 'redis', 'passwords'] }
)
