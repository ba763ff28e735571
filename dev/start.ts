/*
 * npm start. With a store URL, or in production, it is the service alone. Otherwise it is the service on private stores, with a
 * sign-up page, and with the codes in the log.
 *
 * Nothing is imported before the signals are handled: loading the service takes a second.
 */
const { DATABASE_URL, REDIS_URL, NODE_ENV } = process.env
if (DATABASE_URL || REDIS_URL || NODE_ENV === 'production') await import('../src/server.js')
else await startWithPrivateStores()

async function startWithPrivateStores(): Promise<void> {
  /** Ctrl-C reaches this process twice within this time: from the terminal, and from npm. */
  const samePressMs = 500
  /** End what has been started so far. */
  const closers: (() => Promise<unknown>)[] = []
  let stoppingSince: number | undefined

  async function stop(exitCode: number): Promise<void> {
    stoppingSince = performance.now()
    // The service needs its stores until it is closed.
    for (const close of closers.reverse()) await close()
    process.exit(exitCode)
  }

  for (const signal of ['SIGINT', 'SIGTERM'] as const) {
    process.on(signal, () => {
      if (stoppingSince === undefined) stop(0)
      else if (performance.now() - stoppingSince > samePressMs) process.exit(1)
    })
  }

  try {
    await start(closers)
  } catch (error) {
    // After a signal, a failure is a consequence of the stop.
    if (stoppingSince !== undefined) return
    const { messagesOf } = await import('../src/telemetry/error-messages.js')
    process.stderr.write(`mobile-signup: ${messagesOf(error).join(': ')}\n`)
    await stop(1)
  }
}

async function start(closers: (() => Promise<unknown>)[]): Promise<void> {
  const { EmbeddedStores } = await import('./embedded-stores.js')
  const { receiveCodes } = await import('./code-receiver.js')
  const { loadConfig } = await import('../src/config/config.js')
  const stores = await EmbeddedStores.prepare('.data')
  const config = loadConfig({
    ...process.env,
    ...stores.environment(process.env),
    SMS_WEBHOOK_URL: process.env.SMS_WEBHOOK_URL || (await receiveCodes(() => app.log))
  })
  closers.push(() => stores.stop())
  await stores.start()

  // Loading these takes a second. A bad environment and a folder that cannot be used are reported before.
  const { demoBanner, prettyLog } = await import('./demo.js')
  const { signUpPage } = await import('./sign-up-page.js')
  const { buildApp } = await import('../src/app.js')
  const { migrate } = await import('../src/stores/migrations.js')
  await migrate(config.databaseUrl)
  const app = await buildApp(config, { logStream: await prettyLog() })
  closers.push(() => app.close())
  await app.register(signUpPage, { config })
  const address = await app.listen({ port: config.port, host: config.host })
  process.stdout.write(await demoBanner(config.redisUrl, `${address}${config.apiPrefix}`))
}
