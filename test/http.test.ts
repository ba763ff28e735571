import { once } from 'node:events'
import { connect, type Socket } from 'node:net'
import { promisify } from 'node:util'
import type { FastifyInstance } from 'fastify'
import t, { type Test } from 'tap'
import type { Environment } from '#src/config/config.js'
import { startTestbed } from '../testkit/testbed.js'
import { until } from '../testkit/until.js'

const { build, holdInserts, log, signUpBody } = await startTestbed(t)

/** Builds an application that listens. */
async function listen(t: Test, env: Environment = {}) {
  const app = await build(t, env)
  const port = Number(new URL(await app.listen({ port: 0, host: '127.0.0.1' })).port)
  return { app, port }
}

/** Opens a connection, and waits until the server has accepted it. */
async function openConnection({ server }: FastifyInstance, port: number): Promise<Socket> {
  const accepted = once(server, 'connection')
  // An error is followed by 'close'.
  const socket = connect(port, '127.0.0.1').on('error', () => undefined)
  await accepted
  return socket.setEncoding('utf8').resume()
}

const untilClosed = (socket: Socket) => new Promise((resolve) => socket.once('close', resolve))

const untilNoConnection = ({ server }: FastifyInstance) =>
  until('the server has no connection', async () => (await promisify(server.getConnections.bind(server))()) === 0)

/** Opens a connection that records what the server sends. */
async function openRecorded(app: FastifyInstance, port: number) {
  const socket = await openConnection(app, port)
  let replies = ''
  socket.on('data', (text) => {
    replies += text
  })
  return { socket, closed: untilClosed(socket), replies: () => replies }
}

/**
 * Sends bytes on a new connection.
 *
 * @param body is sent after the server has parsed the head
 * @returns what the server sends until the first complete reply or the end of the connection
 */
async function exchange(app: FastifyInstance, port: number, head: string, body = ''): Promise<string> {
  const { socket, closed, replies } = await openRecorded(app, port)
  socket.on('data', () => {
    // A reply ends with its JSON body.
    if (/\r\n\r\n.*\}$/s.test(replies())) socket.end()
  })
  const headParsed = body !== '' && once(app.server, 'request')
  socket.write(head)
  await headParsed
  if (body !== '') socket.write(body)
  await closed
  return replies()
}

const host = 'Host: service\r\n'
const json = `${host}Content-Type: application/json\r\n`
const incompleteSignUp = `POST /api/v1.0/users HTTP/1.1\r\n${json}Content-Length: 100\r\n\r\n{"mobile":`

/** Returns the bytes of a sign-up that succeeds. */
async function signUpRequest(): Promise<string> {
  const body = JSON.stringify(await signUpBody())
  return `POST /api/v1.0/users HTTP/1.1\r\n${json}Content-Length: ${Buffer.byteLength(body)}\r\n\r\n${body}`
}

const { app, port } = await listen(t)

// Starts here because it takes ten seconds: the other tests run meanwhile.
const timedOutRequest = once(app.server, 'request')
const timedOutReply = exchange(app, port, incompleteSignUp)
await timedOutRequest

/** What HTTP or URL parsing refuses, and its status. The last field is sent after the server has parsed the head. */
const refusals = [
  ['not HTTP', 400, 'GARBAGE\r\n\r\n'],
  ['an unknown method', 400, `FOO / HTTP/1.1\r\n${host}\r\n`],
  ['HTTP/2', 400, 'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n'],
  ['no Host', 400, 'GET /api/v1.0/session HTTP/1.1\r\n\r\n'],
  ['two Hosts', 400, `GET /api/v1.0/session HTTP/1.1\r\n${host}hOST: service\r\n\r\n`],
  ...[' ', 'a b', 'a, b', 'a/b', 'user@a', 'a:b', 'a:123456', 'a:1:2', '[::1', '[a]', '::1', '"a"', 'a?', 'ä'].map(
    (text) => [`the Host ${text}`, 400, `GET /api/v1.0/session HTTP/1.1\r\nHost: ${text}\r\n\r\n`] as const
  ),
  ['two Hosts of HTTP/1.0', 400, `GET /api/v1.0/session HTTP/1.0\r\n${host}${host}\r\n`],
  ['201 header lines', 431, `GET /api/v1.0/session HTTP/1.1\r\n${host}${'X: 1\r\n'.repeat(200)}\r\n`],
  ['1,500 header lines', 431, `POST /nowhere HTTP/1.1\r\n${host}${'X: 1\r\n'.repeat(1_500)}\r\n`],
  [
    'an unknown expectation',
    417,
    `POST /api/v1.0/users HTTP/1.1\r\n${json}Expect: a wonder\r\nContent-Length: 2\r\n\r\n{}`
  ],
  ['CONNECT', 400, `CONNECT service:1 HTTP/1.1\r\n${host}\r\n`],
  ['a URL that cannot be decoded', 400, `GET /api/v1.0/%zz HTTP/1.1\r\n${host}\r\n`],
  ['headers over 16 KiB', 431, `GET / HTTP/1.1\r\n${host}X: ${'x'.repeat(20_000)}\r\n\r\n`],
  ['two lengths', 400, `POST / HTTP/1.1\r\n${json}Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}`],
  ['a length and chunks', 400, `POST / HTTP/1.1\r\n${json}Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}`],
  [
    'a chunk without a valid size',
    400,
    `POST /api/v1.0/users HTTP/1.1\r\n${json}Transfer-Encoding: chunked\r\n\r\n`,
    'zz\r\n'
  ]
] as const

t.test('what HTTP or URL parsing refuses gets a 4xx in the envelope with errno 4201', async (t) => {
  for (const [name, status, head, body] of refusals) {
    const reply = await exchange(app, port, head, body)
    t.match(reply, `HTTP/1.1 ${status} `, name)
    t.equal(reply.split('\r\n\r\n')[1], '{"errno":"4201","errmsg":"非法请求"}')
  }
})

t.test('a request with 200 header lines, and with any form of a host, is answered', async (t) => {
  for (const head of [
    `GET /api/v1.0/session HTTP/1.1\r\n${host}${'X: 1\r\n'.repeat(199)}\r\n`,
    'GET /api/v1.0/session HTTP/1.0\r\n\r\n',
    ...['a', 'a_b.example.com', 'A-1.example.:8080', '192.0.2.1', '192.0.2.1:80', '[2001:db8::1]', '[::1]:3000'].map(
      (text) => `GET /api/v1.0/session HTTP/1.1\r\nHost: ${text}\r\n\r\n`
    )
  ]) {
    t.match(await exchange(app, port, head), /^HTTP\/1.1 401 /, head.slice(0, 60))
  }
})

t.test('a Content-Encoding other than identity is refused with 415, also around a plain body', async (t) => {
  const body = JSON.stringify(await signUpBody())
  for (const [encoding, status] of [
    ['gzip', 415],
    ['GZIP', 415],
    ['deflate', 415],
    ['br', 415],
    ['zstd', 415],
    ['x', 415],
    ['identity, gzip', 415],
    ['gzip\r\nContent-Encoding: identity', 415],
    ['', 201],
    ['Identity', 201]
  ] as const) {
    const sent = status === 201 ? JSON.stringify(await signUpBody()) : body
    const head = `POST /api/v1.0/users HTTP/1.1\r\n${json}Content-Encoding: ${encoding}\r\nContent-Length: ${Buffer.byteLength(sent)}\r\n\r\n`
    const reply = await exchange(app, port, head, sent)
    t.match(reply, `HTTP/1.1 ${status} `, encoding)
    if (status === 415) t.match(reply, '{"errno":"4103","errmsg":"不支持的内容类型"}')
  }
})

/** What never becomes a request: Node emits `connect` for the first, and `clientError` for the second. */
const refusedByParser = [`CONNECT service:1 HTTP/1.1\r\n${host}\r\n`, 'GARBAGE\r\n\r\n']

t.test('a client that resets its connection after a refusal does not end the service', async (t) => {
  const { app, port } = await listen(t)
  for (const bytes of refusedByParser) {
    const inserts = await holdInserts(t)
    const { socket } = await openRecorded(app, port)
    const refused = once(app.server, bytes.startsWith('CONNECT') ? 'connect' : 'clientError')
    // The refusal waits for the sign-up, so the reset comes before it.
    socket.write(`${await signUpRequest()}${bytes}`)
    await inserts.arrived(1)
    await refused
    socket.resetAndDestroy()
    await untilNoConnection(app)
    await inserts.release()
  }
  t.equal((await app.inject('/health/live')).statusCode, 200)
})

t.test('a client that does not close its side after a refusal loses the connection', async (t) => {
  const { app, port } = await listen(t)
  for (const bytes of refusedByParser) {
    const socket = connect({ port, host: '127.0.0.1', allowHalfOpen: true })
    socket.on('error', () => undefined).resume()
    socket.write(bytes)
    await once(socket, 'end')
    // Nobody reads these bytes.
    socket.write('more')
    await untilNoConnection(app)
    socket.destroy()
  }
})

t.test('the id of a reply is in the log, also if HTTP or URL parsing refuses the request', async (t) => {
  for (const [name, status, head, body] of refusals) {
    const reply = await exchange(app, port, head, body)
    const [, id = 'none'] = /\r\nx-request-id: (\S+)\r\n/i.exec(reply) ?? []
    const lines = log().split('\n')
    const requestLines = lines.filter((line) => line.includes(`"reqId":"${id}"`)).map((line) => JSON.parse(line))
    t.match(requestLines, [{ level: 30, status, outcome: 'bad_request', msg: 'request' }], name)
    t.equal(requestLines.length, 1, name)
  }
})

t.test('a body that is too large or absent is refused in the envelope', async (t) => {
  const chunk = `${(5_000).toString(16)}\r\n${' '.repeat(5_000)}\r\n`
  for (const [name, status, head, body] of [
    ['a length over 4 KiB', 413, `POST /api/v1.0/users HTTP/1.1\r\n${json}Content-Length: 5000\r\n\r\n`],
    ['chunks over 4 KiB', 413, `POST /api/v1.0/users HTTP/1.1\r\n${json}Transfer-Encoding: chunked\r\n\r\n`, chunk],
    ['no body', 400, `POST /api/v1.0/users HTTP/1.1\r\n${json}Content-Length: 0\r\n\r\n`],
    ['neither a body nor a type', 400, `POST /api/v1.0/users HTTP/1.1\r\n${host}\r\n`],
    [
      'DELETE with type JSON and no body is accepted',
      200,
      `DELETE /api/v1.0/session HTTP/1.1\r\n${json}Content-Length: 0\r\n\r\n`
    ]
  ] as const) {
    const reply = await exchange(app, port, head, body)
    t.match(reply, `HTTP/1.1 ${status} `, name)
    t.match(reply, '\r\n\r\n{"errno":"')
  }
})

t.test('shutdown answers accepted requests, refuses later ones with 503, and closes idle connections', async (t) => {
  const { app, port } = await listen(t)
  const idle = await openConnection(app, port)
  const idleClosed = untilClosed(idle)
  const { socket, closed, replies } = await openRecorded(app, port)

  const inserts = await holdInserts(t)
  socket.write(await signUpRequest())
  await inserts.arrived(1)
  const appClosed = app.close()
  await idleClosed
  // It is read while the first request waits, and answered after it, as HTTP/1.1 requires. The last one says close.
  const secondRequest = once(app.server, 'request')
  socket.write(`GET /api/v1.0/session HTTP/1.1\r\n${host}\r\n`)
  await secondRequest
  await inserts.release()
  await Promise.all([appClosed, closed])

  t.match(
    replies(),
    /^HTTP\/1.1 201 [\s\S]*"session":true\}\}HTTP\/1.1 503 [\s\S]*retry-after: 1\r\n[\s\S]*\{"errno":"4500",/
  )
  const connectionHeaders = [...replies().matchAll(/\r\nconnection: (\S+)/gi)].map(([, value]) => value)
  t.strictSame(connectionHeaders, ['keep-alive', 'close'])
})

t.test('from its announcement on, a shutdown closes each connection with a reply, and cuts no request', async (t) => {
  const { app, port } = await listen(t)
  const inserts = await holdInserts(t)
  const session = `GET /api/v1.0/session HTTP/1.1\r\n${host}\r\n`
  const inFlight = await openRecorded(app, port)
  inFlight.socket.write(await signUpRequest())
  await inserts.arrived(1)
  const idle = await openRecorded(app, port)
  idle.socket.write(session)
  await once(idle.socket, 'data')
  app.lifecycle.announceShutdown()
  for (const request of [session, `GET /%zz HTTP/1.1\r\n${host}\r\n`, `GET /openapi.json HTTP/1.1\r\n${host}\r\n`]) {
    const { socket, closed, replies } = await openRecorded(app, port)
    socket.write(request)
    await closed
    t.match(replies(), /\r\nconnection: close\r\n/i)
  }
  await inserts.release()
  await inFlight.closed
  t.match(inFlight.replies(), /^HTTP\/1.1 201 [\s\S]*\r\nconnection: close\r\n/i)

  // What is on its way when the server closes: on a new connection, and on an idle one.
  const fresh = await openRecorded(app, port)
  const appClosed = app.close()
  await until('the server has closed', () => !app.server.listening)
  for (const { socket } of [fresh, idle]) socket.write(session)
  await Promise.all([fresh.closed, idle.closed])
  t.match(fresh.replies(), /^HTTP\/1.1 503 [\s\S]*\r\nconnection: close\r\n/i)
  t.match(idle.replies(), /^HTTP\/1.1 401 [\s\S]*HTTP\/1.1 503 [\s\S]*\r\nconnection: close\r\n/i)
  await appClosed
})

t.test('shutdown does not wait for a request that never arrives completely', async (t) => {
  const { app, port } = await listen(t)
  const halfBody = await openConnection(app, port)
  const received = once(app.server, 'request')
  halfBody.write(incompleteSignUp)
  await received
  const halfHead = await openConnection(app, port)
  halfHead.write(`GET /api/v1.0/session HTTP/1.1\r\n${host}\r\nGET /api/v1.0/sess`)
  await once(halfHead, 'data')
  const closed = Promise.all([untilClosed(halfBody), untilClosed(halfHead)])
  await app.close()
  await closed
})

t.test('bytes after a request that cannot be parsed add nothing to its refusal', async (t) => {
  const { app, port } = await listen(t)
  const inserts = await holdInserts(t)
  const { socket, closed, replies } = await openRecorded(app, port)
  const received = once(app.server, 'request')
  const sendGarbage = async () => {
    const refused = once(app.server, 'clientError')
    socket.write('GARBAGE\r\n\r\n')
    await refused
  }
  socket.write(await signUpRequest())
  await inserts.arrived(1)
  const [, response] = await received
  await sendGarbage()
  const listeners = response.listenerCount('close')
  for (let n = 0; n < 3; n++) await sendGarbage()
  t.equal(response.listenerCount('close'), listeners)
  await inserts.release()
  await closed
  t.strictSame(replies().match(/HTTP\/1\.1 \d+/g), ['HTTP/1.1 201', 'HTTP/1.1 400'])
})

t.test('good requests before garbage on a connection are answered first, in order', async (t) => {
  const { app, port } = await listen(t)
  for (const [name, garbage, status] of [
    ['not HTTP', 'GARBAGE\r\n\r\n', 400],
    ['a chunk without a valid size', `POST / HTTP/1.1\r\n${json}Transfer-Encoding: chunked\r\n\r\nzz\r\n`, 400],
    ['CONNECT', `CONNECT service:1 HTTP/1.1\r\n${host}\r\n`, 400],
    ['an unknown expectation', `POST / HTTP/1.1\r\n${json}Expect: a wonder\r\nContent-Length: 2\r\n\r\n{}`, 417]
  ] as const) {
    const { socket, closed, replies } = await openRecorded(app, port)
    const inserts = await holdInserts(t)
    socket.write(`${await signUpRequest()}GET /api/v1.0/session HTTP/1.1\r\n${host}\r\n${garbage}`)
    await inserts.arrived(1)
    await inserts.release()
    await closed
    const statuses = [...replies().matchAll(/HTTP\/1\.1 (\d+)/g)].map(([, code]) => Number(code))
    t.strictSame(statuses, [201, 401, status], name)
    t.equal(replies().split('\r\n\r\n').at(-1), '{"errno":"4201","errmsg":"非法请求"}', name)
  }
})

t.test('every reply has X-Request-Id, and headers that forbid caching, sniffing, framing and scripts', async (t) => {
  const { app, port } = await listen(t, { DOCS: 'true' })
  const get = (path: string) => `GET ${path} HTTP/1.1\r\n${host}Connection: close\r\n\r\n`
  for (const request of [
    get('/api/v1.0/session'),
    get('/nowhere'),
    get('/health/live'),
    get('/openapi.json'),
    get('/docs/'),
    get('/docs/static/index.css'),
    get('/api/v1.0/%zz'),
    `TRACE /api/v1.0/session HTTP/1.1\r\n${host}Connection: close\r\n\r\n`,
    `OPTIONS /api/v1.0/users HTTP/1.1\r\n${host}Origin: https://elsewhere.example\r\nConnection: close\r\n\r\n`,
    'GARBAGE\r\n\r\n',
    `CONNECT service:1 HTTP/1.1\r\n${host}\r\n`,
    `POST / HTTP/1.1\r\n${json}Expect: a wonder\r\nContent-Length: 2\r\n\r\n{}`
  ]) {
    const reply = await exchange(app, port, request)
    const about = request.slice(0, 40)
    t.match(reply, /\r\ncache-control: no-store\r\n/i, about)
    t.match(reply, /\r\nx-request-id: [0-9a-f-]{36}\r\n/i, about)
    t.match(reply, /\r\ncontent-type: [a-z/]+; charset=utf-8\r\n/i, about)
    t.match(reply, /\r\nx-content-type-options: nosniff\r\n/i, about)
    t.match(reply, /\r\nreferrer-policy: no-referrer\r\n/i, about)
    const [, policy = ''] = /\r\ncontent-security-policy: (.*)\r\n/i.exec(reply) ?? []
    for (const directive of ["base-uri 'none'", "frame-ancestors 'none'"]) t.ok(policy.includes(directive), about)
    // Nothing but the page /docs may load or run anything.
    t.match(policy, request.includes('/docs/') ? "object-src 'none'" : /^default-src 'none'.*; sandbox$/, about)
    t.notMatch(reply, /\r\naccess-control-/i, 'no other origin may read it')
    if (/^(TRACE|OPTIONS)/.test(request)) t.match(reply, /^HTTP\/1.1 404 /, about)
  }
})

t.test('a request that does not arrive within ten seconds gets 408', async (t) => {
  const reply = await timedOutReply
  t.match(reply, /^HTTP\/1.1 408 /)
  t.equal(reply.split('\r\n\r\n')[1], '{"errno":"4201","errmsg":"非法请求"}')
})
