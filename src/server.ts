import { lowerPoolPriority } from './thread-pool.js'
import './name-lookups.js'
import { lookup } from 'node:dns/promises'
import { setDefaultAutoSelectFamilyAttemptTimeout } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'

/** Whether a signal has been received. */
let isStopping = false
let stoppingSince = 0
/** Ends gracefully what the start has begun so far. */
let stop = async (): Promise<void> => undefined
/** Writes the log lines so far. Returns false while the reader of standard output is too slow. */
let flushLog = (): boolean => true

/** How long the end of the process waits for the reader of standard output. */
const logPatienceMs = 1_000

/** Ctrl-C reaches this process twice within this time: from the terminal, and from npm. */
const samePressMs = 500

// Before anything else is loaded: until then Node as process 1 ignores the signals.
for (const signal of ['SIGINT', 'SIGTERM'] as const) {
  process.on(signal, async () => {
    if (isStopping) {
      if (signal === 'SIGINT' && performance.now() - stoppingSince < samePressMs) return
      // A second signal skips graceful shutdown.
      return exit(1)
    }
    isStopping = true
    stoppingSince = performance.now()
    await stop()
    await exit(0)
  })
}

/** How long the start waits for migrations before the server listens. During longer ones it must answer the liveness probe. */
const migrationPatienceMs = 5_000

try {
  await main()
} catch (error) {
  // After a signal, a failure is a consequence of the shutdown.
  if (!isStopping) {
    const { messagesOf } = await import('./telemetry/error-messages.js')
    process.stderr.write(`mobile-signup: ${messagesOf(error).join(': ')}\n`)
    await exit(1)
  }
}

/** Ends the process when its log is written. */
async function exit(code: number): Promise<void> {
  const deadline = performance.now() + logPatienceMs
  while (!flushLog() && performance.now() < deadline) await sleep(10)
  process.exit(code)
}

async function main(): Promise<void> {
  // Before the modules that it instruments are loaded.
  const isTracing = Boolean(process.env.OTEL_EXPORTER_OTLP_ENDPOINT)
  const stopTracing = isTracing ? (await import('./telemetry/traces.js')).startTracing() : undefined
  // A bad environment is reported before the rest is loaded. Loading takes half a second of CPU time.
  const { loadConfig } = await import('./config/config.js')
  const config = loadConfig(process.env)
  const { buildApp } = await import('./app.js')
  const { migrate } = await import('./stores/migrations.js')
  const { jsonLog } = await import('./telemetry/log.js')

  // Each address of a store but the last has this time to connect. Node's 250 ms are short for one that is far away.
  setDefaultAutoSelectFamilyAttemptTimeout(Math.ceil(config.storeTimeoutMs / 2))
  const logStream = jsonLog()
  flushLog = logStream.flush
  await lowerPoolPriority(config.poolThreads)
  const app = await buildApp(config, { logStream })
  // Node's own report prints every field of an error, and a Redis error carries the arguments of its command.
  process.on('uncaughtException', (err) => {
    app.log.fatal({ err }, 'uncaught exception')
    exit(1)
  })
  stop = async () => {
    app.lifecycle.announceShutdown()
    if (app.server.listening) await sleep(config.shutdownDelayMs)
    setTimeout(() => {
      app.log.error('the shutdown took longer than SHUTDOWN_TIMEOUT_MS')
      exit(1)
    }, config.shutdownTimeoutMs)
    await app.close()
    await stopTracing?.()
  }
  if (isStopping) return

  const migrated = config.migrate ? migrate(config.databaseUrl) : undefined
  await Promise.race([migrated, sleep(migrationPatienceMs, undefined, { ref: false })])
  // Until here no request can come. From `listen` on they are refused until the migration has ended.
  app.lifecycle.isStarted = false
  // Fastify would open a second server for the other address of localhost, without the handlers of http/.
  const { address: host } = await lookup(config.host, { order: 'ipv4first' })
  // Without a host Node listens on `::`, or on `0.0.0.0` where the kernel has no IPv6.
  await app.listen({ port: config.port, host: host === '::' ? '' : host })
  await migrated
  app.lifecycle.isStarted = true
}
