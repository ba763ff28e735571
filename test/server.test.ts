import { execFile, spawn } from 'node:child_process'
import { once } from 'node:events'
import { existsSync } from 'node:fs'
import { readFile, rm, writeFile } from 'node:fs/promises'
import { createServer } from 'node:http'
import { connect, createServer as createTcpServer } from 'node:net'
import { join } from 'node:path'
import { promisify } from 'node:util'
import pg from 'pg'
import t, { type Test } from 'tap'
import type { Environment } from '../dist/config/config.js'
import { freePort } from '../dist/dev/embedded-stores.js'
import { client, statusAndErrno } from '../testkit/client.js'
import { listen } from '../testkit/listen.js'
import { ServerProcess } from '../testkit/server-process.js'
import { createTemporaryFolder } from '../testkit/temporary-folder.js'
import { patient, startTestbed } from '../testkit/testbed.js'
import { retried, until } from '../testkit/until.js'

const { stores, postgres, startService, signUpBody, holdInserts } = await startTestbed(t)

// Some tests wait for fixed times of the service, so they run in parallel.
t.jobs = 3

async function createFolder(t: Test): Promise<string> {
  const folder = createTemporaryFolder()
  t.teardown(() => rm(folder, { recursive: true }))
  return folder
}

/** Starts the built service with private stores, which keep their data in the folder. */
function startEmbedded(t: Test, folder: string, env: Environment = {}): ServerProcess {
  const service = ServerProcess.start(undefined, { env: { ...patient, ...env }, cwd: folder })
  t.teardown(() => service.dispose())
  return service
}

/** Runs the curl command that a first run prints, and returns the reply with its headers. */
async function runPrintedCommand(service: ServerProcess): Promise<string> {
  const [command] = await service.waitFor(/curl .*(?=\n)/)
  const { stdout } = await promisify(execFile)('sh', ['-c', command])
  return stdout
}

/** Returns the ports of the private stores of a folder. */
async function storePorts(folder: string): Promise<number[]> {
  const postmasterPid = await readFile(join(folder, '.data/postgres/postmaster.pid'), 'utf8')
  const redisConfig = await readFile(join(folder, '.data/redis.conf'), 'utf8')
  return [Number(postmasterPid.split('\n')[3]), Number(/^port (\d+)/m.exec(redisConfig)?.[1])]
}

async function refusesConnections(port: number): Promise<boolean> {
  const socket = connect(port, '127.0.0.1')
  const isRefused = await once(socket, 'connect').then(
    () => false,
    () => true
  )
  socket.destroy()
  return isRefused
}

/** Returns NODE_OPTIONS that append the URL of every ES module that a process loads to a file. */
function recordModules(file: string): string {
  const hooks = `
    import { appendFileSync } from 'node:fs'
    export async function load(url, context, nextLoad) {
      appendFileSync(${JSON.stringify(file)}, url + '\\n')
      return nextLoad(url, context)
    }`
  const dataUrl = (code: string) => `data:text/javascript,${encodeURIComponent(code)}`
  const registration = `import { register } from 'node:module'; register(${JSON.stringify(dataUrl(hooks))})`
  return `--import=${dataUrl(registration)}`
}

/** Returns the counter in the id of a printed reply. */
const counterOf = (reply: string) => BigInt(/"user_id":"(\d+)"/.exec(reply)?.[1] ?? -1) & 4_194_303n

t.test('without store URLs the service runs on private stores, whose data survives restarts and kills', async (t) => {
  const folder = await createFolder(t)

  const first = startEmbedded(t, folder)
  const firstReply = await runPrintedCommand(first)
  t.match(firstReply, /^HTTP\/1.1 201 /, 'the printed command signs up')
  t.equal(counterOf(firstReply), 0n)
  const firstPorts = await storePorts(folder)
  first.kill('SIGTERM')
  t.strictSame(await first.exit, [0, null], 'SIGTERM ends it with exit code 0')
  for (const port of firstPorts) t.ok(await refusesConnections(port), 'the stores end with the service')

  const second = startEmbedded(t, folder)
  t.equal(counterOf(await runPrintedCommand(second)), 1n, 'the first user still exists')
  const secondPorts = await storePorts(folder)
  second.kill('SIGKILL')
  await second.exit
  for (const port of secondPorts) await until(`port ${port} is closed`, () => refusesConnections(port))

  const third = startEmbedded(t, folder)
  t.match(await runPrintedCommand(third), /^HTTP\/1.1 201 /, 'a start after a kill works')

  const rival = startEmbedded(t, folder)
  t.strictSame(await rival.exit, [1, null], 'a second service in the same folder does not start')
  t.match(rival.stderr, /^mobile-signup: the private Postgres did not start: .*postmaster\.pid.*\n$/)
  t.match(await runPrintedCommand(third), /idempotent-replayed: true/, 'the running service is not disturbed')

  third.kill('SIGINT')
  t.strictSame(await third.exit, [0, null], 'SIGINT ends it with exit code 0')
})

t.test('production loads nothing of src/dev', async (t) => {
  const folder = await createFolder(t)
  const modulesIn = async (file: string) => (await readFile(file, 'utf8')).trim().split('\n')
  const isDev = (url: string) => url.includes('/dist/dev/')

  const productionFile = join(folder, 'production')
  const production = startService(t, {
    NODE_ENV: 'production',
    SMS: 'off',
    TRUST_PROXY: 'none',
    HASH_MEMORY_KIB: '7168',
    HASH_PASSES: '5',
    NODE_OPTIONS: recordModules(productionFile)
  })
  t.equal((await client(await production.url()).signUp(await signUpBody())).statusCode, 201)
  t.equal(await production.stop(), 0)
  const productionModules = await modulesIn(productionFile)
  t.ok(
    productionModules.some((url) => url.endsWith('/dist/app.js')),
    'modules are recorded'
  )
  t.strictSame(productionModules.filter(isDev), [])

  // A file in the place of the data folder stops this start after the modules are loaded.
  await writeFile(join(folder, '.data'), '')
  const embeddedFile = join(folder, 'embedded')
  const embedded = startEmbedded(t, folder, { NODE_OPTIONS: recordModules(embeddedFile) })
  t.strictSame(await embedded.exit, [1, null])
  t.match(embedded.stderr, /^mobile-signup: cannot create .*\.data for private stores/)
  t.ok((await modulesIn(embeddedFile)).some(isDev), 'the embedded mode loads src/dev')
})

t.test('a start on an empty database migrates it, and the log has only JSON lines', async (t) => {
  await postgres.query('CREATE DATABASE empty')
  const databaseUrl = new URL(stores.databaseUrl)
  databaseUrl.pathname = '/empty'
  const service = startService(t, { DATABASE_URL: databaseUrl.href })
  const body = await signUpBody()
  t.equal((await client(await service.url()).signUp(body)).statusCode, 201)
  const connection = new pg.Client(databaseUrl.href)
  await connection.connect()
  const { rows } = await connection.query('SELECT mobile FROM users')
  await connection.end()
  t.strictSame(rows, [{ mobile: body.mobile }])
  t.equal(await service.stop(), 0)
  for (const line of service.stdout.trim().split('\n')) t.doesNotThrow(() => JSON.parse(line))
})

t.test('an invalid environment stops the start with one message and exit code 1', async (t) => {
  const service = startService(t, { PORT: 'http', LEGACY_STATUS: '1' })
  t.strictSame(await service.exit, [1, null])
  t.equal(
    service.stderr,
    `mobile-signup: invalid environment:
  PORT: "http" is not an integer; expected an integer from 0 to 65535
  LEGACY_STATUS: "1" is neither true nor false; expected true or false
`
  )
})

t.test(
  'a folder in which no private stores can be created stops the start, and the line says what to do',
  async (t) => {
    const folder = await createFolder(t)
    await writeFile(join(folder, '.data'), 'a file')
    const service = startEmbedded(t, folder)
    t.strictSame(await service.exit, [1, null])
    t.match(service.stderr, /^mobile-signup: cannot create \/.*\.data .*: set DATABASE_URL and REDIS_URL .*\n$/)
  }
)

t.test('a PORT in use stops the start with one line and exit code 1', async (t) => {
  const service = startService(t, { PORT: new URL(stores.redisUrl).port })
  t.strictSame(await service.exit, [1, null])
  t.match(service.stderr, /^mobile-signup: listen EADDRINUSE: [^\n]*\n$/)
})

t.test('an unavailable store stops the start after 10 s with one line and exit code 1', async (t) => {
  const port = await freePort()
  const silentStore = createTcpServer().listen(port, '127.0.0.1')
  t.teardown(() => silentStore.close())
  for (const [service, line] of [
    [
      startService(t, { DATABASE_URL: 'postgresql://postgres@127.0.0.1:1/postgres' }),
      /^Postgres does not answer: .*ECONNREFUSED.*$/
    ],
    [startService(t, { REDIS_URL: 'redis://127.0.0.1:1' }), /^Redis does not answer: .*ECONNREFUSED.*$/],
    // It accepts connections and says nothing.
    [
      startService(t, { DATABASE_URL: `postgresql://postgres@127.0.0.1:${port}/postgres`, STORE_TIMEOUT_MS: '60000' }),
      /^Postgres does not answer: no answer$/
    ]
  ] as const) {
    t.strictSame(await service.exit, [1, null])
    const [, message = ''] = /^mobile-signup: ([^\n]*)\n$/.exec(service.stderr) ?? []
    t.match(message, line)
  }
})

t.test('SIGTERM while the start waits for a store ends it with exit code 0', async (t) => {
  const silentStore = createServer()
  const storeUrl = new URL(await listen(t, silentStore))
  for (const env of [
    { DATABASE_URL: `postgresql://postgres@${storeUrl.host}/postgres` },
    { REDIS_URL: `redis://${storeUrl.host}` },
    { REDIS_URL: `redis://${storeUrl.host}`, OTEL_EXPORTER_OTLP_ENDPOINT: 'http://127.0.0.1:1' }
  ]) {
    const connected = once(silentStore, 'connection')
    const service = startService(t, env)
    await connected
    service.kill('SIGTERM')
    t.strictSame(await service.exit, [0, null])
    t.equal(service.stderr, '')
  }
})

t.test('SIGTERM during a first start ends the private stores, too, whatever has been started', async (t) => {
  const files = ['secret', 'postgres.unfinished', 'postgres.log', 'redis.log']
  for (const file of files) {
    const folder = await createFolder(t)
    const service = startEmbedded(t, folder)
    await until(`${file} exists`, () => existsSync(join(folder, '.data', file)))
    service.kill('SIGTERM')
    t.strictSame(await service.exit, [0, null], file)
    t.equal(service.stderr, '')
    const { stdout } = await promisify(execFile)('ps', ['-eo', 'args'])
    t.notMatch(stdout, folder, 'no process is left')
    if (file === 'redis.log') continue
    const next = startEmbedded(t, folder)
    t.match(await runPrintedCommand(next), /^HTTP\/1.1 201 /, 'the next start works')
    t.equal(await next.stop(), 0)
  }
})

t.test('a long migration does not keep the liveness probe waiting, and requests get 503 4500 meanwhile', async (t) => {
  await postgres.query('CREATE DATABASE slow')
  const databaseUrl = new URL(stores.databaseUrl)
  databaseUrl.pathname = '/slow'
  const other = new pg.Client(databaseUrl.href)
  await other.connect()
  // Another instance migrates: this is the lock of node-pg-migrate.
  await other.query('SELECT pg_advisory_lock(7241865325823964)')
  const service = startService(t, { DATABASE_URL: databaseUrl.href })
  const url = await service.url()
  t.equal((await fetch(`${url}/health/live`)).status, 200)
  const ready = await fetch(`${url}/health/ready`)
  t.match([ready.status, await ready.json()], [503, { errno: '4500', data: { failing: ['starting'] } }])
  const body = await signUpBody()
  t.strictSame(statusAndErrno(await client(url).signUp(body)), [503, '4500'])

  await other.end()
  t.equal((await retried(() => client(url).signUp(body))).statusCode, 201)
  t.equal((await fetch(`${url}/health/ready`)).status, 200)
  t.equal(await service.stop(), 0)
})

t.test('SIGTERM fails the readiness probe, serves for SHUTDOWN_DELAY_MS and exits with 0', async (t) => {
  // Long enough for the requests below on a busy machine.
  const delayMs = 8_000
  const service = startService(t, { SHUTDOWN_DELAY_MS: `${delayMs}` })
  const url = await service.url()
  t.equal((await fetch(`${url}/health/ready`)).status, 200)
  const killedAt = performance.now()
  service.kill('SIGTERM')
  await untilNotReady(url)
  t.equal((await client(url).whoAmI('')).statusCode, 401)
  t.equal((await fetch(`${url}/health/live`)).status, 200)
  t.strictSame(await service.exit, [0, null])
  t.ok(performance.now() - killedAt > delayMs - 100, 'it exits after the delay')
})

t.test('a second signal skips the graceful shutdown', async (t) => {
  const service = startService(t, { SHUTDOWN_DELAY_MS: '600000' })
  const url = await service.url()
  service.kill('SIGTERM')
  await untilNotReady(url)
  service.kill('SIGTERM')
  t.strictSame(await service.exit, [1, null])
})

t.test('a shutdown that exceeds SHUTDOWN_TIMEOUT_MS ends with exit code 1', async (t) => {
  const service = startService(t, { SHUTDOWN_TIMEOUT_MS: '500' })
  const url = await service.url()
  const inserts = await holdInserts(t)
  const disconnected = t.rejects(client(url).signUp(await signUpBody()))
  await inserts.arrived(1)
  service.kill('SIGTERM')
  t.strictSame(await service.exit, [1, null])
  await disconnected
  t.match(service.stdout, 'the shutdown took longer than SHUTDOWN_TIMEOUT_MS')
  await inserts.release()
})

/** Starts the built service with a pipe as standard output, and returns its URL. */
async function startWithPipe(t: Test) {
  const { PATH } = process.env
  const service = spawn(process.execPath, ['dist/server.js'], {
    env: { PATH, PORT: '0', ...stores.environment },
    stdio: ['ignore', 'pipe', 'inherit']
  })
  t.teardown(() => service.kill('SIGKILL'))
  let log = ''
  service.stdout.on('data', (text) => {
    log += text
  })
  await until('the service listens', () => log.includes('Server listening at'))
  return { service, url: /http:[^"]+/.exec(log)?.[0] ?? '' }
}

t.test('the process ends also if the reader of its standard output has gone, or does not read', async (t) => {
  const gone = await startWithPipe(t)
  gone.service.stdout.destroy()
  await fetch(gone.url)
  gone.service.kill('SIGTERM')
  t.strictSame(await once(gone.service, 'exit'), [0, null])

  const stalled = await startWithPipe(t)
  stalled.service.stdout.pause()
  const headers = { 'x-request-id': 'x'.repeat(100) }
  // The log lines of these requests are more than the pipe can hold.
  for (let n = 0; n < 40; n++) {
    await Promise.all(Array.from({ length: 50 }, async () => (await fetch(stalled.url, { headers })).text()))
  }
  stalled.service.kill('SIGTERM')
  t.strictSame(await once(stalled.service, 'exit'), [null, 'SIGKILL'], 'it cannot exit by itself')
})

const untilNotReady = (url: string) =>
  until('the readiness probe fails', async () => (await fetch(`${url}/health/ready`)).status === 503)
