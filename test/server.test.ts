import { execFileSync, spawn } from 'node:child_process'
import { once } from 'node:events'
import { closeSync, constants, openSync, readSync } from 'node:fs'
import { readdir, readFile, rm } from 'node:fs/promises'
import { createServer } from 'node:http'
import { connect, createServer as createTcpServer } from 'node:net'
import { constants as osConstants } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import pg from 'pg'
import t, { type Test } from 'tap'
import { freePort } from '../dev/embedded-stores.js'
import { client, statusAndErrno } from '../testkit/client.js'
import { listen } from '../testkit/listen.js'
import { ServerProcess } from '../testkit/server-process.js'
import { createTemporaryFolder } from '../testkit/temporary-folder.js'
import { patient, startTestbed } from '../testkit/testbed.js'
import { retried, until } from '../testkit/until.js'

const { stores, postgres, startService, signUpBody, holdInserts } = await startTestbed(t)

// Some tests wait for fixed times of the service, so they run in parallel.
t.jobs = 3

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

t.test('a long migration does not keep the liveness probe waiting, and requests get 503 4500 meanwhile', async (t) => {
  await postgres.query('CREATE DATABASE slow')
  const databaseUrl = new URL(stores.databaseUrl)
  databaseUrl.pathname = '/slow'
  const other = new pg.Client(databaseUrl.href)
  await other.connect()
  // Another instance migrates: this is its lock.
  await other.query('SELECT pg_advisory_lock(4931667203518772)')
  const service = startService(t, { DATABASE_URL: databaseUrl.href })
  const url = await service.url()
  t.equal((await fetch(`${url}/health/live`)).status, 200)
  const ready = await fetch(`${url}/health/ready`)
  t.match([ready.status, await ready.json()], [503, { errno: '4500', data: { failing: ['starting'] } }])
  const body = await signUpBody()
  t.strictSame(statusAndErrno(await client(url).signUp(body)), [503, '4500'])

  await other.end()
  t.equal((await retried(() => client(url).signUp(body))).statusCode, 201)
  // The last check, of at most a second ago, has not found the table.
  await until('it is ready', async () => (await fetch(`${url}/health/ready`)).status === 200)
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
  const reply = await client(url).whoAmI('')
  t.equal(reply.statusCode, 401)
  t.equal(reply.headers.connection, 'close')
  t.equal((await fetch(`${url}/health/live`)).status, 200)
  t.strictSame(await service.exit, [0, null])
  t.ok(performance.now() - killedAt > delayMs - 100, 'it exits after the delay')
})

t.test('an idle connection stays open for KEEP_ALIVE_TIMEOUT_MS', async (t) => {
  const service = startService(t, { KEEP_ALIVE_TIMEOUT_MS: '1000' })
  const { hostname, port } = new URL(await service.url())
  const socket = connect(Number(port), hostname)
  const startedAt = performance.now()
  socket.resume().write('GET /health/live HTTP/1.1\r\nHost: service\r\n\r\n')
  await once(socket, 'close')
  t.ok(performance.now() - startedAt >= 1_000)
  const reply = await fetch(`http://${hostname}:${port}/health/live`)
  t.equal(reply.headers.get('keep-alive'), 'timeout=1')
})

t.test("the entry gives libuv's pool one thread for each hash, where Node.js has not used it yet", async (t) => {
  const [major = 0, minor = 0] = process.versions.node.split('.').map(Number)
  const hasUsedPool = major < 24 || (major === 24 && minor < 3)
  for (const file of ['server.js', 'cli.js']) {
    const env = { ...stores.environment, ...patient, HASH_THREADS: '5' }
    const service = ServerProcess.start([`dist/${file}`], { env })
    t.teardown(() => service.dispose())
    if (hasUsedPool) {
      t.strictSame(await service.exit, [1, null], file)
      t.match(service.stderr, /^ {2}HASH_THREADS: 5 .*set UV_THREADPOOL_SIZE=5 /m)
      continue
    }
    await service.url()
    const tasks = `/proc/${service.child.pid}/task`
    const names = await Promise.all((await readdir(tasks)).map((id) => readFile(`${tasks}/${id}/comm`, 'utf8')))
    t.equal(names.filter((name) => name === 'libuv-worker\n').length, 5, file)
  }
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

t.test('HOST=:: serves IPv6 and IPv4, and IPv4 where the kernel has no IPv6, the metrics included', async (t) => {
  // As with the kernel's parameter ipv6.disable=1.
  const withoutIpv6 = `process.binding('tcp_wrap').TCP.prototype.bind6 = () => -${osConstants.errno.EAFNOSUPPORT}`
  const preload = `--disable-warning=DEP0111 --import=data:text/javascript,${encodeURIComponent(withoutIpv6)}`
  for (const [options, hosts] of [
    ['', ['127.0.0.1', '[::1]']],
    [preload, ['127.0.0.1']]
  ] as const) {
    const service = startService(t, { HOST: '::', METRICS_PORT: `${await freePort()}`, NODE_OPTIONS: options })
    const { port } = new URL(await service.url())
    for (const host of hosts) {
      t.equal((await fetch(`http://${host}:${port}/health/live`)).status, 200, host)
      const [, metricsPort] = /Metrics at http:[^"]+:(\d+)/.exec(service.stdout) ?? []
      t.equal((await fetch(`http://${host}:${metricsPort}/metrics`)).status, 200, host)
    }
    t.equal(await service.stop(), 0)
  }
})

/** Starts the built service with this standard output, and returns its URL. */
async function startWithOutput(t: Test, output: 'pipe' | number, env: Record<string, string> = {}) {
  const { PATH } = process.env
  const port = await freePort()
  const service = spawn(process.execPath, ['dist/server.js'], {
    env: { PATH, PORT: `${port}`, ...stores.environment, ...patient, ...env },
    stdio: ['ignore', output, 'inherit']
  })
  t.teardown(() => service.kill('SIGKILL'))
  const url = `http://127.0.0.1:${port}`
  const isReady = () =>
    fetch(`${url}/health/ready`).then(
      ({ ok }) => ok,
      () => false
    )
  await until('the service listens', async () => service.exitCode !== null || (await isReady()))
  return { service, url }
}

/** Opens a pipe with a name. @returns its reader, its writer and its name */
async function openPipe(t: Test): Promise<[number, number, string]> {
  const folder = createTemporaryFolder()
  t.teardown(() => rm(folder, { recursive: true }))
  const pipe = join(folder, 'pipe')
  execFileSync('mkfifo', [pipe])
  const reader = openSync(pipe, constants.O_RDONLY | constants.O_NONBLOCK)
  return [reader, openSync(pipe, constants.O_WRONLY), pipe]
}

t.test('with a full disk as standard output the service starts, serves and ends', async (t) => {
  const fullDisk = openSync('/dev/full', 'w')
  const { service, url } = await startWithOutput(t, fullDisk)
  closeSync(fullDisk)
  for (let n = 0; n < 100; n++) t.equal((await client(url).whoAmI('')).statusCode, 401)
  t.equal((await client(url).signUp(await signUpBody())).statusCode, 201)
  service.kill('SIGTERM')
  t.strictSame(await once(service, 'exit'), [0, null])
})

t.test('lines that cannot be written are counted, and the log goes on with a new reader', async (t) => {
  const [firstReader, output, pipe] = await openPipe(t)
  const { service, url } = await startWithOutput(t, output)
  closeSync(output)
  const read = (file: number): string => {
    const buffer = Buffer.alloc(65_536)
    try {
      return buffer.toString('utf8', 0, readSync(file, buffer))
    } catch {
      return ''
    }
  }
  let log = ''
  const logged = (file: number, text: string) =>
    until(`the log has ${text}`, () => {
      log += read(file)
      return log.includes(text)
    })
  const get = (id: string) => fetch(`${url}/nowhere`, { headers: { 'x-request-id': id } })
  await get('before')
  await logged(firstReader, '"reqId":"before"')
  closeSync(firstReader)
  for (let n = 0; n < 50; n++) await get('lost')
  // Longer than lines wait.
  await sleep(500)
  const secondReader = openSync(pipe, constants.O_RDONLY | constants.O_NONBLOCK)
  log = ''
  await get('after')
  await logged(secondReader, '"reqId":"after"')
  await logged(secondReader, '"msg":"log lines could not be written"')
  const lines = log
    .trim()
    .split('\n')
    .map((line) => JSON.parse(line))
  t.match(lines, [{ reqId: 'after' }, { level: 40, time: Number, dropped: 50 }])
  service.kill('SIGTERM')
  t.strictSame(await once(service, 'exit'), [0, null])
})

t.test('a reader of standard output that has gone or does not read delays neither requests nor the end', async (t) => {
  const gone = await startWithOutput(t, 'pipe')
  gone.service.stdout?.destroy()
  t.equal((await client(gone.url).whoAmI('')).statusCode, 401)
  gone.service.kill('SIGTERM')
  t.strictSame(await once(gone.service, 'exit'), [0, null])

  // A write that waits must not take the only thread for hashes.
  const [stalledReader, output] = await openPipe(t)
  t.teardown(() => closeSync(stalledReader))
  const stalled = await startWithOutput(t, output, { HASH_THREADS: '1', UV_THREADPOOL_SIZE: '1' })
  closeSync(output)
  const headers = { 'x-request-id': 'x'.repeat(100) }
  // The log lines of these requests are more than the pipe can hold.
  for (let n = 0; n < 40; n++) {
    await Promise.all(Array.from({ length: 50 }, () => client(stalled.url).signUp('{}', { headers })))
  }
  t.equal((await client(stalled.url).signUp(await signUpBody())).statusCode, 201)
  stalled.service.kill('SIGTERM')
  t.strictSame(await once(stalled.service, 'exit'), [0, null])
})

t.test('Ctrl-C under npm arrives twice, and is one graceful shutdown', async (t) => {
  const service = startService(t)
  await service.url()
  // npm passes on what the terminal has sent to both.
  service.kill('SIGINT')
  setImmediate(() => service.kill('SIGINT'))
  t.strictSame(await service.exit, [0, null])
})

const untilNotReady = (url: string) =>
  until('the readiness probe fails', async () => (await fetch(`${url}/health/ready`)).status === 503)
