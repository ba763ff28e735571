import { once } from 'node:events'
import { type AddressInfo, connect } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import type { FastifyInstance } from 'fastify'
import t from 'tap'
import { build, holdInserts, signUpBody } from './helper.js'

/** Sends bytes on a connection and gives all that comes back until the service ends it, or nothing more comes. */
async function exchange(app: FastifyInstance, ...chunks: string[]): Promise<string> {
  const { port } = app.server.address() as AddressInfo
  const socket = connect(port, '127.0.0.1')
  let reply = ''
  socket.setEncoding('utf8').on('data', (text) => {
    reply += text
    // A reply is whole with its body: every one has a Content-Length.
    if (/\r\n\r\n.*\}$/s.test(reply)) socket.end()
  })
  const ended = new Promise((resolve) => socket.once('close', resolve).once('error', resolve))
  for (const chunk of chunks) {
    socket.write(chunk)
    await sleep(0)
  }
  await ended
  return reply
}

const host = 'Host: service\r\n'
const json = `${host}Content-Type: application/json\r\n`

t.test('what HTTP or URL parsing refuses gets a 4xx in the envelope with errno 4201', async (t) => {
  const app = await build(t)
  await app.listen({ port: 0 })
  for (const [name, status, ...chunks] of [
    ['not HTTP', 400, 'GARBAGE\r\n\r\n'],
    ['an unknown method', 400, `FOO / HTTP/1.1\r\n${host}\r\n`],
    ['HTTP/2', 400, 'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n'],
    ['no Host', 400, 'GET /api/v1.0/session HTTP/1.1\r\n\r\n'],
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
    ['a chunk of no size', 400, `POST /api/v1.0/users HTTP/1.1\r\n${json}Transfer-Encoding: chunked\r\n\r\n`, 'zz\r\n']
  ] as const) {
    const reply = await exchange(app, ...chunks)
    t.match(reply, `HTTP/1.1 ${status} `, name)
    t.equal(reply.split('\r\n\r\n')[1], '{"errno":"4201","errmsg":"非法请求"}')
  }
})

t.test('bodies that lie about their length are refused, or wait for no more than the rest', async (t) => {
  const app = await build(t)
  await app.listen({ port: 0 })
  const chunk = `${(5_000).toString(16)}\r\n${' '.repeat(5_000)}\r\n`
  for (const [name, status, ...chunks] of [
    ['a length over 4 KiB', 413, `POST /api/v1.0/users HTTP/1.1\r\n${json}Content-Length: 5000\r\n\r\n`],
    ['chunks over 4 KiB', 413, `POST /api/v1.0/users HTTP/1.1\r\n${json}Transfer-Encoding: chunked\r\n\r\n`, chunk],
    ['no body', 400, `POST /api/v1.0/users HTTP/1.1\r\n${json}Content-Length: 0\r\n\r\n`],
    ['neither a body nor a type', 400, `POST /api/v1.0/users HTTP/1.1\r\n${host}\r\n`],
    ['no body of type JSON to DELETE', 200, `DELETE /api/v1.0/session HTTP/1.1\r\n${json}Content-Length: 0\r\n\r\n`]
  ] as const) {
    const reply = await exchange(app, ...chunks)
    t.match(reply, `HTTP/1.1 ${status} `, name)
    t.match(reply, '\r\n\r\n{"errno":"')
  }
})

t.test(
  'shutdown: what was accepted is finished, what still comes in is told to ask again, idle connections go',
  async (t) => {
    const app = await build(t)
    await app.listen({ port: 0 })
    const body = JSON.stringify(await signUpBody())
    const signUp = `POST /api/v1.0/users HTTP/1.1\r\n${json}Content-Length: ${Buffer.byteLength(body)}\r\n\r\n${body}`
    const { port } = app.server.address() as AddressInfo
    const silent = connect(port, '127.0.0.1')
    const silentEnded = new Promise((resolve) => silent.once('close', resolve))

    const inserts = await holdInserts()
    const socket = connect(port, '127.0.0.1')
    let replies = ''
    socket.setEncoding('utf8').on('data', (text) => {
      replies += text
    })
    const ended = new Promise((resolve) => socket.once('close', resolve))
    socket.write(signUp)
    await inserts.arrived(1)
    const closed = app.close()
    // Read while the first still waits; answered after it, as HTTP/1.1 wants.
    const secondRequest = once(app.server, 'request')
    socket.write(`GET /api/v1.0/session HTTP/1.1\r\n${host}\r\n`)
    await secondRequest
    await inserts.release()
    await closed
    await Promise.all([ended, silentEnded])

    t.match(
      replies,
      /^HTTP\/1.1 201 [\s\S]*"session":true\}\}HTTP\/1.1 503 [\s\S]*retry-after: 1\r\n[\s\S]*\{"errno":"4500",/
    )
  }
)

t.test('shutdown does not wait for a request that never ends', async (t) => {
  const app = await build(t)
  await app.listen({ port: 0 })
  const { port } = app.server.address() as AddressInfo
  const halfBody = connect(port, '127.0.0.1')
  const received = once(app.server, 'request')
  halfBody.write(`POST /api/v1.0/users HTTP/1.1\r\n${json}Content-Length: 100\r\n\r\n{"mobile":`)
  await received
  const halfHead = connect(port, '127.0.0.1')
  halfHead.write(`GET /api/v1.0/session HTTP/1.1\r\n${host}\r\nGET /api/v1.0/sess`)
  await once(halfHead, 'data')
  const ended = Promise.all([once(halfBody, 'close'), once(halfHead, 'close')])
  await app.close()
  await ended
})

t.test('a request that does not arrive in ten seconds gets 408', async (t) => {
  const app = await build(t)
  await app.listen({ port: 0 })
  const reply = await exchange(app, `POST /api/v1.0/users HTTP/1.1\r\n${json}Content-Length: 100\r\n\r\n{"mobile":`)
  t.match(reply, /^HTTP\/1.1 408 /)
  t.equal(reply.split('\r\n\r\n')[1], '{"errno":"4201","errmsg":"非法请求"}')
})

t.test('garbage behind a sign-up never looks like its answer', async (t) => {
  const app = await build(t)
  await app.listen({ port: 0 })
  const body = JSON.stringify(await signUpBody())
  const signUp = `POST /api/v1.0/users HTTP/1.1\r\n${json}Content-Length: ${Buffer.byteLength(body)}\r\n\r\n${body}`
  t.notMatch(await exchange(app, `${signUp}GARBAGE\r\n\r\n`), '4201')
})
