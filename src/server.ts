import { setTimeout as sleep } from 'node:timers/promises'
import { loadConfig, usesEmbeddedStores } from './config/config.js'
import { jsonLog } from './telemetry/log.js'

try {
  await main()
} catch (error) {
  process.stderr.write(`mobile-signup: ${messagesOf(error).join(': ')}\n`)
  process.exit(1)
}

async function main(): Promise<void> {
  // Before the modules that it instruments are loaded.
  const stopTracing = process.env.OTEL_EXPORTER_OTLP_ENDPOINT ? await startTracing() : undefined
  const { buildApp } = await import('./app.js')
  const { migrate } = await import('./stores/migrations.js')
  // Nothing of src/dev is loaded in production.
  const dev = usesEmbeddedStores(process.env) ? await import('./dev/embedded-mode.js') : undefined

  const stores = await dev?.EmbeddedStores.prepare('.data')
  const config = loadConfig(process.env, stores?.environment(process.env))
  await stores?.start()

  const app = await buildApp(config, { logStream: dev ? await dev.prettyLog() : jsonLog() })
  // Node's own report prints every field of an error, and a Redis error carries the arguments of its command.
  process.on('uncaughtException', (err) => {
    app.log.fatal({ err }, 'uncaught exception')
    process.exit(1)
  })
  for (const signal of ['SIGINT', 'SIGTERM'] as const) process.on(signal, stop)

  if (config.migrate) await migrate(config.databaseUrl)
  const address = await app.listen({ port: config.port, host: config.host })
  if (dev) process.stdout.write(await dev.demoBanner(config.redisUrl, `${address}${config.apiPrefix}`))

  async function stop() {
    // A second signal skips graceful shutdown.
    if (app.shutdown.isAnnounced) process.exit(1)
    app.shutdown.announce()
    await sleep(config.shutdownDelayMs)
    setTimeout(() => {
      app.log.error('the shutdown took longer than SHUTDOWN_TIMEOUT_MS')
      process.exit(1)
    }, config.shutdownTimeoutMs)
    await app.close()
    await Promise.all([stores?.stop(), stopTracing?.()])
    process.exit(0)
  }
}

async function startTracing(): Promise<() => Promise<void>> {
  const traces = await import('./telemetry/traces.js')
  return traces.startTracing()
}

/** Returns the message of an error and of each of its causes. */
function messagesOf(error: unknown): string[] {
  if (!(error instanceof Error)) return []
  const message = error.message || ('code' in error ? `${error.code}` : error.name)
  return [message, ...messagesOf(error.cause)]
}
