import { execFileSync } from 'node:child_process'
import { once } from 'node:events'
import { connect, type Socket } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import type { FastifyInstance } from 'fastify'
import t, { type Test } from 'tap'
import type { Environment } from '#src/config/config.js'
import { networksOf } from '#src/http/network.js'
import { client } from '../testkit/client.js'
import { movePerformanceClock } from '../testkit/moved-clock.js'
import { startTestbed } from '../testkit/testbed.js'
import { until } from '../testkit/until.js'

/*
 * HTTP as bytes on sockets: what is refused, what follows it on the same connection, shutdowns, and whose address a request has.
 */

const { build, holdInserts, log, newMobile, redis, signUpBody } = await startTestbed(t)

interface Service {
  app: FastifyInstance
  port: number
}

async function listen(t: Test, env: Environment = {}): Promise<Service> {
  const app = await build(t, env)
  return { app, port: Number(new URL(await app.listen({ port: 0, host: '127.0.0.1' })).port) }
}

/** Opens a connection that records what the server sends. */
async function open({ app, port }: Service, allowHalfOpen = false) {
  const accepted: Promise<Socket[]> = once(app.server, 'connection')
  // An error is followed by 'close'.
  const socket = connect({ port, host: '127.0.0.1', allowHalfOpen }).on('error', () => undefined)
  const [served] = await accepted
  if (served === undefined) throw new Error('no connection')
  let replies = ''
  socket.setEncoding('utf8').on('data', (text) => {
    replies += text
  })
  const on = (emitter: Socket, event: string) => new Promise((resolve) => emitter.once(event, resolve))
  return {
    socket,
    /** The server's side. */
    served,
    ended: on(socket, 'end'),
    closed: on(socket, 'close'),
    servedClosed: on(served, 'close'),
    replies: () => replies,
    statuses: () => [...replies.matchAll(/HTTP\/1\.1 (\d+)/g)].map(([, status]) => Number(status))
  }
}

/**
 * Sends bytes on a new connection.
 *
 * @param body is sent after the server has parsed the head
 * @returns what the server sends until the first complete reply or the end of the connection
 */
async function exchange(service: Service, head: string, body = ''): Promise<string> {
  const { socket, closed, replies } = await open(service)
  socket.on('data', () => {
    // A reply ends with its JSON body.
    if (/\r\n\r\n.*\}$/s.test(replies())) socket.end()
  })
  const headParsed = body !== '' && once(service.app.server, 'request')
  socket.write(head)
  await headParsed
  if (body !== '') socket.write(body)
  await closed
  return replies()
}

const host = 'Host: service\r\n'
const json = `${host}Content-Type: application/json\r\n`
const upgrade = 'Upgrade: h2c\r\nConnection: Upgrade\r\n'
const get = (path: string, headers = '') => `GET ${path} HTTP/1.1\r\n${host}${headers}\r\n`
const session = get('/api/v1.0/session')
const live = get('/health/live')
const garbage = 'GARBAGE\r\n\r\n'
const toTunnel = `CONNECT service:1 HTTP/1.1\r\n${host}\r\n`
const withExpectation = `POST /api/v1.0/users HTTP/1.1\r\n${json}Expect: a wonder\r\nContent-Length: 2\r\n\r\n{}`
const incompleteSignUp = `POST /api/v1.0/users HTTP/1.1\r\n${json}Content-Length: 100\r\n\r\n{"mobile":`
const chunked = `POST /api/v1.0/users HTTP/1.1\r\n${json}Transfer-Encoding: chunked\r\n`

/** Returns the bytes of a sign-up that succeeds. */
async function signUpRequest(headers = ''): Promise<string> {
  const body = JSON.stringify(await signUpBody())
  return `POST /api/v1.0/users HTTP/1.1\r\n${json}${headers}Content-Length: ${Buffer.byteLength(body)}\r\n\r\n${body}`
}

const service = await listen(t, { DOCS: 'true' })
const { app } = service

// Starts here because it takes ten seconds: the other tests run meanwhile.
const timedOutRequest = once(app.server, 'request')
const timedOutReply = exchange(service, incompleteSignUp)
await timedOutRequest

const badRequest = '{"errno":"4201","errmsg":"非法请求"}'

/** What HTTP or URL parsing refuses, and its status. The last field is sent after the server has parsed the head. */
const refusals = [
  ['not HTTP', 400, garbage],
  ['an unknown method', 400, `FOO / HTTP/1.1\r\n${host}\r\n`],
  ['HTTP/2', 400, 'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n'],
  ['no Host', 400, 'GET /api/v1.0/session HTTP/1.1\r\n\r\n'],
  ['two Hosts', 400, `GET /api/v1.0/session HTTP/1.1\r\n${host}hOST: service\r\n\r\n`],
  ['two Hosts of HTTP/1.0', 400, `GET /api/v1.0/session HTTP/1.0\r\n${host}${host}\r\n`],
  ...[' ', 'a b', 'a, b', 'a/b', 'user@a', 'a:b', 'a:123456', 'a:1:2', '[::1', '[a]', '::1', '"a"', 'a?', 'ä'].map(
    (text) => [`the Host ${text}`, 400, `GET /api/v1.0/session HTTP/1.1\r\nHost: ${text}\r\n\r\n`] as const
  ),
  ['201 header lines', 431, get('/api/v1.0/session', 'X: 1\r\n'.repeat(200))],
  ['1,500 header lines', 431, get('/nowhere', 'X: 1\r\n'.repeat(1_500))],
  ['headers over 16 KiB', 431, get('/', `X: ${'x'.repeat(20_000)}\r\n`)],
  ['an unknown expectation', 417, withExpectation],
  ['CONNECT', 400, toTunnel],
  ['a URL that cannot be decoded', 400, get('/api/v1.0/%zz')],
  ['two lengths', 400, `POST / HTTP/1.1\r\n${json}Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}`],
  ['a length and chunks', 400, `POST / HTTP/1.1\r\n${json}Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}`],
  ['a chunk without a valid size', 400, `${chunked}\r\n`, 'zz\r\n']
] as const

t.test('what HTTP or URL parsing refuses gets a 4xx in the envelope, whose id is in the log', async (t) => {
  for (const [name, status, head, body] of refusals) {
    const reply = await exchange(service, head, body)
    t.match(reply, `HTTP/1.1 ${status} `, name)
    t.equal(reply.split('\r\n\r\n')[1], badRequest, name)
    checkHeaders(t, reply, name)
    const [, id] = /\r\nx-request-id: (\S+)\r\n/i.exec(reply) ?? []
    const lines = log().split('\n')
    const ownLines = lines.filter((line) => line.includes(`"reqId":"${id}"`)).map((line) => JSON.parse(line))
    t.match(ownLines, [{ level: 30, status, outcome: 'bad_request', msg: 'request' }], name)
    t.equal(ownLines.length, 1, name)
  }
})

t.test('a request with 200 header lines, and with any form of a host, is answered', async (t) => {
  for (const head of [
    get('/api/v1.0/session', 'X: 1\r\n'.repeat(199)),
    'GET /api/v1.0/session HTTP/1.0\r\n\r\n',
    ...['a', 'a_b.example.com', 'A-1.example.:8080', '192.0.2.1', '192.0.2.1:80', '[2001:db8::1]', '[::1]:3000'].map(
      (text) => `GET /api/v1.0/session HTTP/1.1\r\nHost: ${text}\r\n\r\n`
    )
  ]) {
    t.match(await exchange(service, head), /^HTTP\/1.1 401 /, head.slice(0, 60))
  }
})

t.test('every reply has X-Request-Id, and headers that forbid caching, sniffing, framing and scripts', async (t) => {
  for (const [status, path, method = 'GET'] of [
    [401, '/api/v1.0/session'],
    [404, '/nowhere'],
    [200, '/health/live'],
    [200, '/openapi.json'],
    [200, '/docs/'],
    [200, '/docs/static/index.css'],
    [404, '/api/v1.0/session', 'TRACE'],
    [404, '/api/v1.0/users', 'OPTIONS']
  ] as const) {
    const about = `${method} ${path}`
    const head = `${about} HTTP/1.1\r\n${host}Origin: https://elsewhere.example\r\nConnection: close\r\n\r\n`
    const reply = await exchange(service, head)
    t.match(reply, `HTTP/1.1 ${status} `, about)
    // Nothing but the page /docs may load or run anything.
    checkHeaders(t, reply, about, path.startsWith('/docs/') ? "object-src 'none'" : undefined)
  }
})

function checkHeaders(
  t: Test,
  reply: string,
  about: string,
  policyPart: string | RegExp = /^default-src 'none'.*; sandbox$/
) {
  t.match(reply, /\r\ncache-control: no-store\r\n/i, about)
  t.match(reply, /\r\nx-request-id: [0-9a-f-]{36}\r\n/i, about)
  t.match(reply, /\r\ncontent-type: [a-z/]+; charset=utf-8\r\n/i, about)
  t.match(reply, /\r\nx-content-type-options: nosniff\r\n/i, about)
  t.match(reply, /\r\nreferrer-policy: no-referrer\r\n/i, about)
  t.notMatch(reply, /\r\naccess-control-/i, `${about}: no other origin may read it`)
  const [, policy = ''] = /\r\ncontent-security-policy: (.*)\r\n/i.exec(reply) ?? []
  for (const directive of ["base-uri 'none'", "frame-ancestors 'none'", policyPart]) t.match(policy, directive, about)
}

t.test('a body that is too large, coded or absent is refused in the envelope', async (t) => {
  const body = JSON.stringify(await signUpBody())
  const codings = ['gzip', 'GZIP', 'deflate', 'br', 'zstd', 'x', 'identity, gzip', 'gzip\r\nContent-Encoding: identity']
  for (const [name, status, headers, payload] of [
    ['a length over 4 KiB', 413, 'Content-Length: 5000\r\n'],
    ['chunks over 4 KiB', 413, 'Transfer-Encoding: chunked\r\n', `1388\r\n${' '.repeat(5_000)}\r\n`],
    ['no body', 400, 'Content-Length: 0\r\n'],
    ...codings.map((coding) => [coding, 415, `Content-Encoding: ${coding}\r\nContent-Length: 9\r\n`, body] as const)
  ] as const) {
    const reply = await exchange(service, `POST /api/v1.0/users HTTP/1.1\r\n${json}${headers}\r\n`, payload)
    t.match(reply, `HTTP/1.1 ${status} `, name)
    t.match(reply, '\r\n\r\n{"errno":"4103"', name)
  }
  const withoutType = await exchange(service, `POST /api/v1.0/users HTTP/1.1\r\n${host}\r\n`)
  t.match(withoutType, /^HTTP\/1.1 400 .*"4103"/s)
  for (const coding of ['', 'Identity']) {
    t.match(await exchange(service, await signUpRequest(`Content-Encoding: ${coding}\r\n`)), /^HTTP\/1.1 201 /)
  }
  const logOut = `DELETE /api/v1.0/session HTTP/1.1\r\n${json}Content-Length: 0\r\n\r\n`
  t.match(await exchange(service, logOut), /^HTTP\/1.1 200 /, 'DELETE needs no body, whatever its type')
})

t.test('good requests before a refused one on a connection are answered first, in order', async (t) => {
  for (const [name, refused, status] of [
    ['not HTTP', garbage, 400],
    ['a chunk without a valid size', `${chunked}\r\nzz\r\n`, 400],
    ['CONNECT', toTunnel, 400],
    ['an unknown expectation', withExpectation, 417]
  ] as const) {
    const { socket, closed, replies, statuses } = await open(service)
    const inserts = await holdInserts(t)
    socket.write(`${await signUpRequest()}${session}${refused}`)
    await inserts.arrived(1)
    // What follows adds nothing.
    for (let n = 0; n < 3; n++) socket.write(garbage)
    await inserts.release()
    await closed
    t.strictSame(statuses(), [201, 401, status], name)
    t.equal(replies().split('\r\n\r\n').at(-1), badRequest, name)
  }
})

t.test('a client that resets its connection behind a refusal or an Upgrade does not end the service', async (t) => {
  for (const [event, bytes] of [
    ['connect', toTunnel],
    ['clientError', garbage],
    ['upgrade', get('/health/live', upgrade)]
  ] as const) {
    const inserts = await holdInserts(t)
    const { socket, servedClosed } = await open(service)
    const parsed = once(app.server, event)
    // The answer waits for the sign-up, so the reset comes before it.
    socket.write(`${await signUpRequest()}${bytes}`)
    await inserts.arrived(1)
    await parsed
    socket.resetAndDestroy()
    await servedClosed
    await inserts.release()
  }
  t.equal((await app.inject('/health/live')).statusCode, 200)
})

t.test('a client that does not close its side after a refusal loses the connection', async (t) => {
  const connections = []
  for (const bytes of [toTunnel, garbage]) {
    const connection = await open(service, true)
    connection.socket.write(bytes)
    connections.push(connection)
  }
  for (const { socket, ended, servedClosed } of connections) {
    await ended
    // Nobody reads these bytes.
    socket.write('more')
    await servedClosed
    socket.destroy()
  }
  t.pass()
})

t.test('a connection has at most 100 unanswered requests: those are answered, the next one closes it', async (t) => {
  for (const [request, status] of [
    [session, 401],
    [get('/nowhere'), 404],
    [get('/openapi.json'), 200]
  ] as const) {
    for (const count of [101, 1_000]) {
      const { socket, replies, statuses } = await open(service)
      socket.write(request.repeat(count))
      await until('those are answered', () => statuses().length > 100)
      t.strictSame(statuses(), [...Array(100).fill(status), 400], `${count} of ${status}`)
      await until('it is closed', () => socket.destroyed)
      t.equal(replies().split('\r\n\r\n').at(-1), badRequest)
    }
  }
  const { socket, statuses } = await open(service)
  for (const total of [100, 200]) {
    socket.write(session.repeat(100))
    await until('all are answered', () => statuses().length === total)
  }
  t.strictSame(statuses(), Array(200).fill(401), 'the limit is of unanswered ones')
  socket.destroy()
})

t.test('a client that does not read its replies is closed after 30 s, one that waits for a reply is not', async (t) => {
  const inserts = await holdInserts(t)
  const waiting = await open(service)
  waiting.socket.write(await signUpRequest())
  await inserts.arrived(1)
  const { socket, served, closed, servedClosed } = await open(service)
  // More than the kernel takes.
  socket.pause().write(get('/docs/static/swagger-ui-bundle.js').repeat(50))
  await until('a reply waits for the client', () => served.writableLength > 0)
  const { pass } = movePerformanceClock(t)
  // The service checks once a second.
  await sleep(1_100)
  pass(20_000)
  await sleep(1_100)
  t.notOk(served.destroyed, 'not before')
  pass(10_000)
  // It sends something, but reads nothing.
  socket.write('GET /')
  await servedClosed
  socket.resume()
  await closed
  t.notOk(waiting.socket.destroyed)
  await inserts.release()
  await until('the sign-up is answered', () => waiting.statuses().join() === '201')
  waiting.socket.destroy()
})

t.test('a request whose Upgrade is ignored is answered like any other, and so is what follows it', async (t) => {
  const upgraded = get('/health/live', upgrade)
  const websocket = get('/health/live', 'connection: keep-alive, upgrade\r\nupgrade: websocket\r\n')
  for (const [name, bytes, expected] of [
    ['cut in two', [upgraded + session.slice(0, 20), session.slice(20) + get('/nowhere')], [200, 401, 404]],
    ['between others', [live + session + websocket + session], [200, 401, 200, 401]],
    ['many', [upgraded.repeat(30) + session], [...Array(30).fill(200), 401]],
    ['with a body', [(await signUpRequest(upgrade)) + live], [201, 200]],
    ['with chunks', [`${chunked}${upgrade}\r\n2\r\n{}\r\n0\r\n\r\n${session}`], [400, 401]],
    ['before CONNECT', [upgraded + toTunnel], [200, 400]],
    ['before garbage', [upgraded + garbage], [200, 400]],
    ['too many', [session.repeat(150) + upgraded], [...Array(100).fill(401), 400]]
  ] as const) {
    const { socket, statuses, served } = await open(service)
    for (const [index, part] of bytes.entries()) {
      // The first answer shows that the first part has been parsed.
      if (index > 0) await until('the first part is answered', () => statuses().length > 0)
      socket.write(part)
    }
    await until(`${name}: all are answered`, () => statuses().length >= expected.length || socket.destroyed)
    t.strictSame(statuses(), expected, name)
    t.ok(served.listenerCount('error') < 3, 'no listener is left over')
    socket.destroy()
  }
})

t.test('shutdown answers accepted requests, refuses later ones, and closes idle and silent connections', async (t) => {
  const service = await listen(t)
  const { app } = service
  const silent = [await open(service)]
  for (const bytes of [incompleteSignUp, `${session}GET /api/v1.0/sess`]) {
    const connection = await open(service)
    const received = once(app.server, 'request')
    connection.socket.write(bytes)
    await received
    silent.push(connection)
  }
  const { socket, closed, replies } = await open(service)
  const inserts = await holdInserts(t)
  socket.write(await signUpRequest())
  await inserts.arrived(1)
  const appClosed = app.close()
  for (const connection of silent) await connection.closed
  // It is read while the first request waits, and answered after it, as HTTP/1.1 requires. The last one says close.
  const secondRequest = once(app.server, 'request')
  socket.write(session)
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
  const service = await listen(t)
  const { app } = service
  const inserts = await holdInserts(t)
  const inFlight = await open(service)
  inFlight.socket.write(await signUpRequest())
  await inserts.arrived(1)
  const idle = await open(service)
  idle.socket.write(session)
  await once(idle.socket, 'data')
  app.lifecycle.announceShutdown()
  for (const request of [session, get('/%zz'), get('/openapi.json')]) {
    const { socket, closed, replies } = await open(service)
    socket.write(request)
    await closed
    t.match(replies(), /\r\nconnection: close\r\n/i)
  }
  await inserts.release()
  await inFlight.closed
  t.match(inFlight.replies(), /^HTTP\/1.1 201 [\s\S]*\r\nconnection: close\r\n/i)

  // What is on its way when the server closes: on a new connection, and on an idle one.
  const fresh = await open(service)
  const appClosed = app.close()
  await until('the server has closed', () => !app.server.listening)
  for (const { socket } of [fresh, idle]) socket.write(session)
  await Promise.all([fresh.closed, idle.closed])
  t.match(fresh.replies(), /^HTTP\/1.1 503 [\s\S]*\r\nconnection: close\r\n/i)
  t.match(idle.replies(), /^HTTP\/1.1 401 [\s\S]*HTTP\/1.1 503 [\s\S]*\r\nconnection: close\r\n/i)
  await appClosed
})

t.test('an idle connection stays open for KEEP_ALIVE_TIMEOUT_MS', async (t) => {
  const { socket, closed, replies } = await open(await listen(t, { KEEP_ALIVE_TIMEOUT_MS: '1000' }))
  const startedAt = performance.now()
  socket.write(live)
  await closed
  t.ok(performance.now() - startedAt >= 1_000)
  t.match(replies(), /\r\nkeep-alive: timeout=1\r\n/i)
})

t.test('an address counts for its IPv4 address, also inside IPv6, or for its /64 and its /48', async (t) => {
  const ipv4 = [{ network: '192.0.2.1', factor: 1 }]
  const mapped = '192.0.2.1:5678 ::ffff:192.0.2.1 ::ffff:c000:201 [::ffff:192.0.2.1]:5678 ::ffff:0:192.0.2.1'
  const translated = '64:ff9b::192.0.2.1 [64:ff9b::c000:201]:443 64:ff9b:1:2:3:4:c000:201'
  const sixToFour = '2002:c000:201:: 2002:c000:201:5:6:7:8:9'
  for (const address of `192.0.2.1 ${mapped} ${translated} ${sixToFour}`.split(' ')) {
    for (const factor of [64, 4]) t.strictSame(networksOf(address, factor), ipv4, address)
  }
  const forms = '2001:DB8:1:2:: 2001:db8:1:2:3:4:5:6 [2001:db8:1:2::1]:567 [2001:db8:1:2::1] 2001:db8:1:2::/64'
  for (const address of forms.split(' ')) {
    const site = (factor: number) => [
      { network: '2001:db8:1:2::/64', factor: 1 },
      { network: '2001:db8:1::/48', factor }
    ]
    t.strictSame([networksOf(address), networksOf(address, 4)], [site(64), site(4)], address)
  }
  for (const invalid of ['unknown', '', '_hidden', '192.0.2.256', '2001:db8::1::2', ':::']) {
    t.strictSame(networksOf(invalid), [{ network: 'unknown', factor: 1 }], invalid)
  }
})

t.test('G8: a client gone before its request is read counts for no network, and gets nothing done', async (t) => {
  for (const env of [{}, { TRUST_PROXY: '127.0.0.1' }]) {
    const { port } = await listen(t, env)
    const gone = newMobile()
    const body = JSON.stringify({ mobile: gone })
    const request = `POST /api/v1.0/sms_codes HTTP/1.1\r\n${json}Content-Length: ${body.length}\r\n\r\n${body}`
    // Another process sends the request and resets the connection. The service reads nothing meanwhile, because execFileSync blocks
    // this process.
    const script = `
      const socket = require('net').connect(${port}, '127.0.0.1', () =>
        socket.write(${JSON.stringify(request)}, () => socket.resetAndDestroy()))`
    execFileSync(process.execPath, ['-e', script])
    // Node.js 24 does not read the request of such a connection, and 20 does. A later one is answered after it.
    t.equal((await client(`http://127.0.0.1:${port}`).sendCode(newMobile())).statusCode, 202)
    t.strictSame(await redis.keys('*unknown*'), [])
    t.strictSame(await redis.keys(`*${gone}*`), [])
  }
})

t.test('a request that does not arrive within ten seconds gets 408', async (t) => {
  const reply = await timedOutReply
  t.match(reply, /^HTTP\/1.1 408 /)
  t.equal(reply.split('\r\n\r\n')[1], badRequest)
})
