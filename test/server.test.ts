import { execFileSync, spawn, spawnSync } from 'node:child_process'
import { createSocket } from 'node:dgram'
import { once } from 'node:events'
import { closeSync, constants as fsConstants, openSync, readSync } from 'node:fs'
import { readdir, readFile, writeFile } from 'node:fs/promises'
import { createServer as createHttpServer } from 'node:http'
import { createServer } from 'node:net'
import { constants, getPriority } from 'node:os'
import { join } from 'node:path'
import { text } from 'node:stream/consumers'
import { setTimeout as sleep } from 'node:timers/promises'
import pg from 'pg'
import t, { type Test } from 'tap'
import { freePort } from '../dev/embedded-stores.js'
import { client, statusAndErrno } from '../testkit/client.js'
import { listen, listenOnLoopback } from '../testkit/listen.js'
import { queryOnce } from '../testkit/postgres-admin.js'
import { ServerProcess } from '../testkit/server-process.js'
import { temporaryFolderFor } from '../testkit/temporary-folder.js'
import { claimKey, patient, startTestbed } from '../testkit/testbed.js'
import { isReady, retried, until } from '../testkit/until.js'

/*
 * The built service as a process: its start, its signals, its standard output, the names that it looks up, and the spans that it sends.
 */

const testbed = await startTestbed(t)
const { stores, redis, startService, signUpBody, newMobile, issueCode, cookieOf, openProxy } = testbed

// Some tests wait for fixed times of the service, so they run in parallel.
t.jobs = 3

t.test('a service', async (t) => {
  const databaseUrl = await stores.createDatabase('empty')
  const delayMs = 400
  const service = startService(t, {
    DATABASE_URL: databaseUrl,
    HOST: '::',
    METRICS_PORT: '0',
    OTEL_EXPORTER_OTLP_ENDPOINT: 'http://127.0.0.1:1',
    SHUTDOWN_DELAY_MS: `${delayMs}`,
    UV_THREADPOOL_SIZE: '1'
  })
  const { port } = new URL(await service.url())
  const { signUp } = client(`http://127.0.0.1:${port}`)

  await t.test('migrates an empty database at its start', async (t) => {
    const body = await signUpBody()
    t.equal((await signUp(body)).statusCode, 201)
    t.strictSame(await queryOnce(databaseUrl, 'SELECT mobile FROM users'), [{ mobile: body.mobile }])
  })

  await t.test('with HOST=:: answers over IPv6 and IPv4, the metrics included', async (t) => {
    const [, metricsPort] = await service.waitFor(/Metrics at http:[^"]+:(\d+)/)
    for (const host of ['127.0.0.1', '[::1]']) {
      t.equal((await fetch(`http://${host}:${port}/health/live`)).status, 200, host)
      t.equal((await fetch(`http://${host}:${metricsPort}/metrics`)).status, 200, host)
    }
  })

  await t.test(
    'takes a Ctrl-C that arrives twice, as under npm, for one, and ends with 0 after the delay',
    async (t) => {
      const startedAt = performance.now()
      service.kill('SIGINT')
      setImmediate(() => service.kill('SIGINT'))
      t.strictSame(await service.exit, [0, null])
      t.ok(performance.now() - startedAt >= delayMs)
      t.equal(service.stderr, '', 'also without a collector of its spans')
      for (const line of service.stdout.trim().split('\n')) t.doesNotThrow(() => JSON.parse(line))
    }
  )
})

t.test('libuv has a thread for each hash, or a start whose pool is used already fails with one message', async (t) => {
  const [major = 0, minor = 0] = process.versions.node.split('.').map(Number)
  // Then Node.js has used libuv's pool before, and nobody can change its size any more.
  const hasUsedPool = major < 24 || (major === 24 && minor < 3)
  const env = { ...stores.environment, ...patient, HASH_THREADS: '5' }
  const manyHashes = ServerProcess.start(['dist/cli.js'], { env })
  t.teardown(() => manyHashes.dispose())
  if (hasUsedPool) {
    t.strictSame(await manyHashes.exit, [1, null])
    t.match(manyHashes.stderr, /^mobile-signup: .*\n {2}HASH_THREADS: 5 .*set UV_THREADPOOL_SIZE=5 .*\n$/)
    return
  }
  await manyHashes.url()
  const tasks = `/proc/${manyHashes.child.pid}/task`
  const names = await Promise.all((await readdir(tasks)).map((id) => readFile(`${tasks}/${id}/comm`, 'utf8')))
  t.equal(names.filter((name) => name === 'libuv-worker\n').length, 5)
})

/** Starts a store that accepts connections and never answers. */
async function startSilentStore(t: Test) {
  const store = createServer()
  t.teardown(() => store.close())
  const { host } = new URL(await listenOnLoopback(store))
  return { host, connected: once(store, 'connection') }
}

t.test('a store that does not answer stops the start after 10 s with one line and exit code 1', async (t) => {
  const { host, connected } = await startSilentStore(t)
  const DATABASE_URL = `postgresql://postgres@${host}/postgres`
  const service = startService(t, { DATABASE_URL, STORE_TIMEOUT_MS: '60000' })
  const [socket] = await connected
  await once(socket.resume(), 'close')
  t.equal(service.stderr, 'mobile-signup: Postgres does not answer: no answer\n', 'before STORE_TIMEOUT_MS')
  t.strictSame(await service.exit, [1, null])
})

t.test('SIGTERM while the start waits for a store ends it with exit code 0', async (t) => {
  const { host, connected } = await startSilentStore(t)
  const service = startService(t, { REDIS_URL: `redis://${host}` })
  await connected
  service.kill('SIGTERM')
  t.strictSame(await service.exit, [0, null])
  t.equal(service.stderr, '')
})

t.test('ready fails until a long migration has ended and from SIGTERM on; a second SIGTERM ends at once', async (t) => {
  const databaseUrl = await stores.createDatabase('slow')
  const other = new pg.Client(databaseUrl)
  await other.connect()
  // Another instance migrates: this is its lock.
  await other.query('SELECT pg_advisory_lock(4931667203518772)')
  const service = startService(t, { DATABASE_URL: databaseUrl, SHUTDOWN_DELAY_MS: '600000' })
  const url = await service.url()
  const ready = async () => {
    const reply = await fetch(`${url}/health/ready`)
    return { status: reply.status, ...JSON.parse(await reply.text()) }
  }
  const isLive = async () => (await fetch(`${url}/health/live`)).status === 200
  t.ok(await isLive())
  t.match(await ready(), { status: 503, errno: '4500', data: { failing: ['starting'] } })
  const body = await signUpBody()
  const refused = await client(url).signUp(body)
  t.strictSame([...statusAndErrno(refused), refused.headers['retry-after']], [503, '4500', '1'])

  await other.end()
  t.equal((await retried(() => client(url).signUp(body))).statusCode, 201)
  // The last check, of at most a second ago, has not found the table.
  await until('it is ready', async () => (await ready()).status === 200)

  service.kill('SIGTERM')
  await until('ready fails', async () => (await ready()).status === 503)
  t.match(await ready(), { errno: '4500', data: { failing: ['shutting down'] } })
  const served = await client(url).whoAmI('')
  t.strictSame([served.statusCode, served.headers.connection], [401, 'close'])
  t.ok(await isLive())
  service.kill('SIGTERM')
  t.strictSame(await service.exit, [1, null])
})

/** Starts the built service with this standard output, and returns its URL. */
async function startWithOutput(t: Test, output: number, env: Record<string, string> = {}) {
  const port = await freePort()
  const service = startService(t, { PORT: `${port}`, UV_THREADPOOL_SIZE: '1', ...env }, output)
  const url = `http://127.0.0.1:${port}`
  await until('the service is ready', async () => service.hasExited || (await isReady(url)))
  return { service, url }
}

t.test('with a full disk as standard output, and without IPv6 in the kernel, a service', async (t) => {
  // As with the kernel's parameter ipv6.disable=1.
  const withoutIpv6 = `process.binding('tcp_wrap').TCP.prototype.bind6 = () => -${constants.errno.EAFNOSUPPORT}`
  const metricsPort = await freePort()
  const proxy = await openProxy(t, 'DATABASE_URL')
  const { service, url } = await startWithOutput(t, openSync('/dev/full', 'w'), {
    DATABASE_URL: proxy.url,
    HOST: '::',
    METRICS_PORT: `${metricsPort}`,
    SHUTDOWN_TIMEOUT_MS: '500',
    NODE_OPTIONS: `--disable-warning=DEP0111 --import=data:text/javascript,${encodeURIComponent(withoutIpv6)}`
  })

  await t.test('starts, and serves over IPv4, the metrics included', async (t) => {
    for (let n = 0; n < 50; n++) t.equal((await client(url).whoAmI('')).statusCode, 401)
    t.equal((await client(url).signUp(await signUpBody())).statusCode, 201)
    t.equal((await fetch(`http://127.0.0.1:${metricsPort}/metrics`)).status, 200)
  })

  await t.test('ends with exit code 1 if its shutdown exceeds SHUTDOWN_TIMEOUT_MS', async (t) => {
    const inserting = proxy.strike('insert_user', { kind: 'hold', until: service.exit })
    const reply = client(url)
      .signUp(await signUpBody())
      .catch((error) => error)
    await inserting
    service.kill('SIGTERM')
    t.strictSame(await service.exit, [1, null])
    t.match(await reply, TypeError, 'the client is disconnected')
  })
})

t.test('log lines that cannot be written are counted, and delay neither requests nor the end', async (t) => {
  const folder = temporaryFolderFor(t)
  const pipe = join(folder, 'pipe')
  execFileSync('mkfifo', [pipe])
  const openReader = () => openSync(pipe, fsConstants.O_RDONLY | fsConstants.O_NONBLOCK)
  const firstReader = openReader()
  const { service, url } = await startWithOutput(t, openSync(pipe, fsConstants.O_WRONLY))
  let log = ''
  const logged = (file: number, text: string) =>
    until(`the log has ${text}`, () => {
      const buffer = Buffer.alloc(65_536)
      try {
        log += buffer.toString('utf8', 0, readSync(file, buffer))
      } catch {
        // There is nothing to read.
      }
      return log.includes(text)
    })
  const get = (id: string) => fetch(`${url}/nowhere`, { headers: { 'x-request-id': id } })
  await get('before')
  await logged(firstReader, '"reqId":"before"')
  closeSync(firstReader)
  for (let n = 0; n < 50; n++) await get('lost')
  // Longer than lines wait.
  await sleep(500)
  const secondReader = openReader()
  t.teardown(() => closeSync(secondReader))
  log = ''
  await get('after')
  await logged(secondReader, '"msg":"log lines could not be written"')
  const lines = log
    .trim()
    .split('\n')
    .map((line) => JSON.parse(line))
  t.match(lines, [{ reqId: 'after' }, { level: 40, time: Number, dropped: 50 }])

  // The log lines of these requests are more than the pipe can hold. A write that waits must not take the only thread for hashes.
  const headers = { 'x-request-id': 'x'.repeat(128) }
  for (let n = 0; n < 6; n++) {
    await Promise.all(Array.from({ length: 50 }, () => client(url).signUp('{}', { headers })))
  }
  t.equal((await client(url).signUp(await signUpBody())).statusCode, 201)
  service.kill('SIGTERM')
  t.strictSame(await service.exit, [0, null])
})

t.test(
  'the threads that hash have a lower priority than the event loop',
  { skip: process.platform !== 'linux' },
  async (t) => {
    // One thread hashes: HASH_THREADS is at most UV_THREADPOOL_SIZE.
    const service = startService(t, { HASH_MEMORY_KIB: '19456', HASH_PASSES: '6', UV_THREADPOOL_SIZE: '1' })
    const url = await service.url()
    const { pid } = service.child

    async function readThreads() {
      const ids = await readdir(`/proc/${pid}/task`)
      const stats = await Promise.all(ids.map((id) => readFile(`/proc/${pid}/task/${id}/stat`, 'utf8')))
      return stats.map((stat, n) => {
        // The name may contain spaces. After it, utime is field 14, stime 15 and nice 19 (proc(5)).
        const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ')
        const [utime, stime, nice] = [fields[11], fields[12], fields[16]].map(Number)
        return { id: Number(ids[n]), cpuTime: (utime ?? 0) + (stime ?? 0), nice }
      })
    }
    const before = new Map((await readThreads()).map(({ id, cpuTime }) => [id, cpuTime]))
    const bodies = await Promise.all(Array.from({ length: 20 }, () => signUpBody()))
    await Promise.all(bodies.map((body) => client(url).signUp(body)))
    const used = ({ id, cpuTime }: { id: number; cpuTime: number }) => cpuTime - (before.get(id) ?? 0)
    const byCpuTime = (await readThreads()).sort((a, b) => used(b) - used(a))
    t.equal(byCpuTime.find(({ id }) => id === pid)?.nice, getPriority())
    t.equal(byCpuTime.find(({ id }) => id !== pid)?.nice, 5)
  }
)

/** A process has its own /etc/resolv.conf by a mount namespace, which needs root, as does port 53. The machine keeps its own. */
const isPossible = process.getuid?.() === 0 && spawnSync('unshare', ['-m', 'true']).status === 0
const skipNames = !isPossible && 'only root has mount namespaces and port 53'

/** Starts a name server. It is silent where its zone, by type and name, has neither IPv4 addresses nor an rcode. */
async function startNameServer(t: Test, zone: Record<string, string[] | number>) {
  const host = '127.0.0.153'
  const asked: string[] = []
  const server = createSocket('udp4')
  server.on('message', (query, { port, address }) => {
    const labels: string[] = []
    let offset = 12
    for (let length = query[offset] ?? 0; length > 0; length = query[offset] ?? 0) {
      labels.push(query.toString('latin1', offset + 1, offset + 1 + length))
      offset += 1 + length
    }
    const type = query.readUInt16BE(offset + 1) === 28 ? 'AAAA' : 'A'
    const name = labels.join('.').toLowerCase()
    asked.push(name)
    const answer = zone[`${type} ${name}`] ?? zone[name]
    if (answer === undefined) return
    const [addresses, rcode] = typeof answer === 'number' ? [[], answer] : [answer, 0]
    const header = Buffer.from(query.subarray(0, 12))
    for (const [index, value] of [0x8180 + rcode, 1, addresses.length, 0, 0].entries())
      header.writeUInt16BE(value, 2 + 2 * index)
    // A pointer to the name, type A, class IN, TTL 0.
    const records = addresses.map((text) =>
      Buffer.from([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 0, 0, 4, ...text.split('.').map(Number)])
    )
    server.send(Buffer.concat([header, query.subarray(12, offset + 5), ...records]), port, address)
  })
  await once(server.bind(53, host), 'listening')
  t.teardown(() => server.close())

  /** Runs Node.js with this name server. */
  async function run(args: string[], options: string, env: Record<string, string> = {}) {
    const folder = temporaryFolderFor(t)
    const file = join(folder, 'resolv.conf')
    await writeFile(file, `nameserver ${host}\n${options}`)
    const command = `mount --bind ${file} /etc/resolv.conf && exec "$@"`
    const child = spawn('unshare', ['-m', 'sh', '-c', command, 'sh', process.execPath, ...args], {
      env: { PATH: process.env.PATH, ...env },
      stdio: ['ignore', 'pipe', 'pipe']
    })
    t.teardown(() => child.kill('SIGKILL'))
    const output = { child, text: '' }
    for (const stream of [child.stdout, child.stderr]) stream.on('data', (data) => (output.text += data))
    return output
  }
  return { asked, run }
}

t.test(
  'the names of stores are found, and a silent name server of the webhook holds up nobody',
  { skip: skipNames },
  async (t) => {
    const { asked, run } = await startNameServer(t, {
      'A stores.cluster.local': ['127.0.0.1'],
      'AAAA stores.cluster.local': 0,
      // A search domain that the name server refuses, or fails, must not hide the name behind it.
      'stores.cluster.local.refused.example': 5,
      'stores.cluster.local.failing.example': 2
    })
    const withName = (url: string) => url.replace('127.0.0.1', 'stores.cluster.local')
    const service = await run(['dist/server.js'], 'search refused.example failing.example\noptions ndots:5\n', {
      ...stores.environment,
      ...patient,
      DATABASE_URL: withName(stores.databaseUrl),
      REDIS_URL: withName(stores.redisUrl),
      SMS_WEBHOOK_URL: 'https://sms.silent.example/',
      PORT: '0',
      HASH_THREADS: '1',
      UV_THREADPOOL_SIZE: '1'
    })
    await until('the service listens', () => /listening at http/.test(service.text) || service.child.exitCode !== null)
    const [, url = ''] = /Server listening at (http:[^"]+)/.exec(service.text) ?? []
    const sends = [1, 2].map(() => client(url).sendCode(newMobile()))
    await until('the name server is asked', () => asked.some((name) => name.startsWith('sms.silent.example')))
    const first = await Promise.race([client(url).signUp(await signUpBody()), ...sends])
    t.equal(first.statusCode, 201, 'the sign-up is answered while the look-ups wait for 3.5 s')
    for (const send of sends) t.strictSame(statusAndErrno(await send), [503, '4301'])
    // It writes its coverage when it ends.
    service.child.kill('SIGTERM')
    t.strictSame(await once(service.child, 'exit'), [0, null])
  }
)

interface Span {
  name: string
  traceId: string
  spanId: string
  parentSpanId?: string
  kind: number
}

/** The kind of a span that a request to the service starts. */
const serverKind = 2

/** The span of the gateway, the parent of a request's span. */
const gatewaySpanId = '00f067aa0ba902b7'

const traceparent = (traceId: string, flags = '01') => ({ traceparent: `00-${traceId}-${gatewaySpanId}-${flags}` })

/** Starts a collector of OTLP over HTTP on loopback. */
async function startCollector(t: Test) {
  const collector = { url: '', received: '', spans: [] as Span[] }
  const server = createHttpServer(async (request, response) => {
    const body = await text(request)
    collector.received += body
    for (const { scopeSpans } of JSON.parse(body).resourceSpans) {
      for (const { spans } of scopeSpans) collector.spans.push(...spans)
    }
    response.setHeader('content-type', 'application/json').end('{}')
  })
  collector.url = await listen(t, server)
  return collector
}

t.test('G7: a request is one span of the gateway’s trace, above its round trips, without a secret', async (t) => {
  const collector = await startCollector(t)
  const service = startService(t, {
    OTEL_EXPORTER_OTLP_ENDPOINT: collector.url,
    OTEL_RESOURCE_ATTRIBUTES: 'zone=a',
    // So the shutdown sends all spans.
    OTEL_BSP_SCHEDULE_DELAY: '600000'
  })
  const url = await service.url()
  const { signUp } = client(url)
  const body = await signUpBody()
  const { mobile, password } = body
  const [traceId, unsampledTraceId] = ['a'.repeat(32), 'f'.repeat(32)]
  const registered = await signUp(body, { headers: traceparent(traceId) })
  t.equal(registered.statusCode, 201)
  await signUp(body, { headers: traceparent(unsampledTraceId, '00') })
  await fetch(`${url}/${mobile}?password=${password}`)
  await signUp(password)
  // The script of the hold fails, with an error that quotes the claim.
  await redis.set(claimKey(mobile), 'not JSON')
  await signUp({ ...body, sms_code: await issueCode(mobile) })
  await fetch(`${url}/health/ready`)

  // A mobile in a header. Such a header joins no trace.
  const joinedTraceId = 'b'.repeat(32)
  const encodedMobile = [...mobile].map((digit) => `%3${digit}`).join('')
  const headersWithMobile = [
    { ...traceparent(joinedTraceId), tracestate: `m=${mobile}`, baggage: `m=${mobile}` },
    { ...traceparent(joinedTraceId), tracestate: `m=${encodedMobile}` },
    traceparent(mobile.padStart(32, '0')),
    { traceparent: `00-${joinedTraceId}-${mobile.padEnd(16, '0')}-01` },
    { traceparent: `cc-${joinedTraceId}-${gatewaySpanId}-01-${mobile}` },
    { 'x-request-id': `0${mobile}` },
    { 'user-agent': mobile, host: `${mobile}.example`, cookie: `sid=${mobile}`, referer: `http://a/${mobile}` }
  ]
  for (const headers of headersWithMobile) await fetch(`${url}/api/v1.0/session?m=${mobile}`, { headers })
  t.strictSame(collector.spans, [])
  t.equal(await service.stop(), 0)

  const spans = collector.spans.filter((span) => span.traceId === traceId)
  const [request, ...otherRequests] = spans.filter(({ kind }) => kind === serverKind)
  t.equal(otherRequests.length, 0)
  t.match(request, { name: 'POST /api/v1.0/users', parentSpanId: gatewaySpanId })
  const children = spans.filter(({ parentSpanId }) => parentSpanId === request?.spanId).map(({ name }) => name)
  t.ok(children.filter((name) => name.startsWith('evalsha')).length >= 2, `${children}`)
  t.match(children.join(), /pg.query:INSERT|pg-pool/)
  const spanIds = new Set([gatewaySpanId, ...spans.map(({ spanId }) => spanId)])
  for (const { parentSpanId = '' } of spans) t.ok(spanIds.has(parentSpanId), 'every span has its parent')
  for (const { traceId } of collector.spans) t.not(traceId, unsampledTraceId, 'what the gateway does not sample')
  const joined = collector.spans.filter((span) => span.kind === serverKind && span.traceId === joinedTraceId)
  t.strictSame(
    joined.map(({ parentSpanId }) => parentSpanId),
    [gatewaySpanId, gatewaySpanId]
  )

  const { stdout } = service
  for (const text of ['"mobile-signup"', '"zone"']) t.match(collector.received, text)
  t.match(stdout, `"trace_id":"${traceId}"`)
  t.match(stdout, 'user_script', 'the log has the error of Redis')
  for (const text of ['/health/', 'user_script', 'not JSON']) t.notMatch(collector.received, text)
  const sessionId = /sid=([^.%;]+)/.exec(cookieOf(registered))?.[1]
  for (const secret of [mobile, encodedMobile, password, body.sms_code, `${sessionId}`]) {
    t.notOk(collector.received.includes(secret), 'no span has it')
    t.notOk(stdout.includes(secret), 'no line has it')
  }
})
