import { setTimeout as sleep } from 'node:timers/promises'
import { isEmbedded, loadConfig } from './config/config.js'
import { jsonLog } from './telemetry/log.js'

try {
  await main()
} catch (error) {
  process.stderr.write(`mobile-signup: ${causes(error).join(': ')}\n`)
  process.exit(1)
}

async function main(): Promise<void> {
  // Before the clients of the stores are loaded.
  const tracing = process.env.OTEL_EXPORTER_OTLP_ENDPOINT ? await import('./telemetry/traces.js') : undefined
  const stopTracing = tracing?.startTracing()
  const { buildApp } = await import('./app.js')
  const { migrate } = await import('./stores/migrations.js')
  const { demoBanner, prettyLog } = await import('./dev/demo.js')
  const { EmbeddedStores } = await import('./dev/stores.js')

  const stores = isEmbedded(process.env) ? await EmbeddedStores.prepare('.data') : undefined
  const config = loadConfig(process.env, stores?.environment(process.env))
  await stores?.start()

  const app = await buildApp(config, stores ? await prettyLog() : jsonLog())
  // Node's own report would print all fields of an error, and a Redis error carries the command's arguments.
  process.on('uncaughtException', (err) => {
    app.log.fatal({ err }, 'uncaught exception')
    process.exit(1)
  })
  for (const signal of ['SIGINT', 'SIGTERM'] as const) process.on(signal, stop)

  if (config.migrate) await migrate(config.databaseUrl)
  const address = await app.listen({ port: config.port, host: config.host })
  if (stores) process.stdout.write(await demoBanner(config.redisUrl, `${address}${config.apiPrefix}`))

  async function stop() {
    // Whoever asks twice does not want to wait.
    if (app.connections.closing) process.exit(1)
    app.connections.announceClosing()
    await sleep(config.shutdownDelayMs)
    setTimeout(() => {
      app.log.error('the shutdown took too long')
      process.exit(1)
    }, config.shutdownTimeoutMs)
    await app.close()
    await Promise.all([stores?.stop(), stopTracing?.()])
    process.exit(0)
  }
}

/** The messages of an error and of what caused it. */
function causes(error: unknown): string[] {
  if (!(error instanceof Error)) return []
  const message = error.message || ('code' in error ? `${error.code}` : error.name)
  return [message, ...causes(error.cause)]
}
