import { once } from 'node:events'
import { connect, type Socket } from 'node:net'
import { mock } from 'node:test'
import t from 'tap'
import { startTestbed } from '../testkit/testbed.js'
import { until } from '../testkit/until.js'

const { build, holdInserts, signUpBody } = await startTestbed(t)

const host = 'Host: service\r\n'
const get = (path: string, headers = '') => `GET ${path} HTTP/1.1\r\n${host}${headers}\r\n`

const app = await build(t, { DOCS: 'true' })
const port = Number(new URL(await app.listen({ port: 0, host: '127.0.0.1' })).port)

/** Opens a connection. It reads nothing until `replies` is called. */
async function open() {
  const accepted: Promise<Socket[]> = once(app.server, 'connection')
  const socket = connect(port, '127.0.0.1').on('error', () => undefined)
  const [served] = await accepted
  if (served === undefined) throw new Error('no connection')
  const closed = new Promise((resolve) => socket.once('close', resolve))
  t.teardown(() => socket.destroy())
  let text = ''
  /** Reads on, and returns the statuses of the replies so far. */
  function statuses(): number[] {
    if (socket.listenerCount('data') === 0) socket.setEncoding('utf8').on('data', (more) => (text += more))
    return [...text.matchAll(/HTTP\/1\.1 (\d+)/g)].map(([, status]) => Number(status))
  }
  return { socket, served, closed, statuses, text: () => text }
}

async function signUpRequest(headers = ''): Promise<string> {
  const body = JSON.stringify(await signUpBody())
  const length = Buffer.byteLength(body)
  return `POST /api/v1.0/users HTTP/1.1\r\n${host}${headers}Content-Type: application/json\r\nContent-Length: ${length}\r\n\r\n${body}`
}

const mib = () => process.memoryUsage().rss / 1_024 ** 2

const upgrade = 'Upgrade: h2c\r\nConnection: Upgrade\r\n'

t.test('pipelined requests whose replies nobody reads take little memory, whatever they ask for', async (t) => {
  for (const request of [
    get('/openapi.json'),
    get('/nowhere'),
    get('/api/v1.0/%zz'),
    get('/api/v1.0/session', upgrade),
    `POST / HTTP/1.1\r\n${host}Expect: a wonder\r\n\r\n`
  ]) {
    const before = mib()
    const connections = await Promise.all([open(), open(), open()])
    for (const { socket } of connections) socket.pause().write(request.repeat((57 * 1_024) / request.length))
    // All of it has been parsed, or Node reads no further.
    const seen = () => connections.map(({ served }) => served.bytesRead).join()
    let last = ''
    await until('nothing more is read', async () => {
      const isSame = last === seen()
      last = seen()
      await new Promise((resolve) => setTimeout(resolve, 200))
      return isSame
    })
    t.ok(mib() - before < 100, `${Math.round(mib() - before)} MiB for ${request.split('\r')[0]}`)
    for (const { socket } of connections) socket.destroy()
  }
})

t.test('a connection has at most 100 unanswered requests: those are answered, the next one closes it', async (t) => {
  for (const [count, expected] of [
    [100, Array(100).fill(401)],
    [101, [...Array(100).fill(401), 400]],
    [1_000, [...Array(100).fill(401), 400]]
  ] as const) {
    const { socket, closed, statuses, text } = await open()
    socket.write(get('/api/v1.0/session').repeat(count))
    statuses()
    if (count > 100) await closed
    await until('all are answered', () => statuses().length === expected.length)
    t.strictSame(statuses(), expected, `${count} requests`)
    if (count > 100) {
      t.equal(text().split('\r\n\r\n').at(-1), '{"errno":"4201","errmsg":"非法请求"}')
      continue
    }
    // The limit is of unanswered ones.
    socket.write(get('/api/v1.0/session').repeat(count))
    await until('those are answered, too', () => statuses().length === 200)
  }
})

t.test('a client that does not read its replies is closed after 30 s, one that waits for a reply is not', async (t) => {
  const inserts = await holdInserts(t)
  const waiting = await open()
  waiting.statuses()
  waiting.socket.write(await signUpRequest())
  await inserts.arrived(1)
  const { socket, served, closed } = await open()
  // More than the kernel takes.
  served.setNoDelay()
  socket.pause().write(get('/docs/static/swagger-ui-bundle.js').repeat(50))
  await until('a reply waits for the client', () => served.writableLength > 0)
  const start = performance.now()
  let elapsedMs = 0
  const { now } = performance
  const clock = mock.method(performance, 'now', () => now.call(performance) + elapsedMs)
  t.teardown(() => clock.mock.restore())
  const unread = Promise.race([once(served, 'close'), new Promise((resolve) => setTimeout(resolve, 2_500))])
  await unread
  t.notOk(served.destroyed, 'not before')
  t.ok(performance.now() - start < 30_000)
  elapsedMs = 30_000
  // It sends something, but reads nothing.
  socket.write('GET /')
  await once(served, 'close')
  socket.resume()
  await closed
  t.notOk(waiting.socket.destroyed)
  await inserts.release()
  await until('the sign-up is answered', () => waiting.statuses().join() === '201')
})

t.test('a request whose Upgrade is ignored is answered like any other, and so is what follows it', async (t) => {
  const session = get('/api/v1.0/session')
  const live = get('/health/live')
  const nowhere = get('/nowhere')
  for (const [name, bytes, expected] of [
    ['h2c', [get('/health/live', upgrade) + session, nowhere], [200, 401, 404]],
    [
      'websocket',
      [get('/health/live', 'Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n') + session],
      [200, 401]
    ],
    [
      'TLS, in lower case, after others',
      [live + session + get('/nowhere', upgrade.toLowerCase()) + session],
      [200, 401, 404, 401]
    ],
    ['many', [get('/health/live', upgrade).repeat(30) + session], [...Array(30).fill(200), 401]],
    ['with a body', [(await signUpRequest(upgrade)) + live], [201, 200]],
    [
      'with chunks',
      [
        `POST /api/v1.0/users HTTP/1.1\r\n${host}${upgrade}Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n${session}`
      ],
      [400, 401]
    ],
    ['cut in two', [get('/health/live', upgrade) + session.slice(0, 20), session.slice(20) + nowhere], [200, 401, 404]],
    [
      'before CONNECT',
      [`${get('/health/live', upgrade)}CONNECT service:1 HTTP/1.1\r\n${host}${upgrade}\r\n`],
      [200, 400]
    ],
    ['before garbage', [`${get('/health/live', upgrade)}GARBAGE\r\n\r\n`], [200, 400]],
    ['too many', [session.repeat(150) + get('/health/live', upgrade)], [...Array(100).fill(401), 400]]
  ] as const) {
    const { socket, statuses, served } = await open()
    for (const [index, part] of bytes.entries()) {
      // The first answer shows that the first part has been parsed.
      if (index > 0) await until('the first part is answered', () => statuses().length > 0)
      socket.write(part)
    }
    await until(`${name}: all are answered`, () => statuses().length >= expected.length || socket.destroyed)
    t.strictSame(statuses(), expected, name)
    t.equal(served.listenerCount('error') < 3, true, 'no listener is left over')
    socket.destroy()
  }
})

t.test('a client that resets its connection after a request with an Upgrade does not end the service', async (t) => {
  const inserts = await holdInserts(t)
  const { socket, served } = await open()
  const upgraded = once(app.server, 'upgrade')
  socket.write((await signUpRequest()) + get('/health/live', upgrade))
  await upgraded
  const closed = new Promise((resolve) => served.once('close', resolve))
  socket.resetAndDestroy()
  await closed
  await inserts.release()
  t.equal((await app.inject('/health/live')).statusCode, 200)
})
