import { execFileSync, spawn } from 'node:child_process'
import { createHmac } from 'node:crypto'
import dns from 'node:dns'
import { once } from 'node:events'
import { readFileSync } from 'node:fs'
import { rm } from 'node:fs/promises'
import { globalAgent } from 'node:https'
import net, { type Socket } from 'node:net'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import tls from 'node:tls'
import t, { type Test } from 'tap'
import { MessageNotSent, MessageRefused } from '#src/codes/senders/sender.js'
import { webhookSender } from '#src/codes/senders/webhook.js'
import { freePort } from '../dev/embedded-stores.js'
import { createTemporaryFolder } from '../testkit/temporary-folder.js'
import { until } from '../testkit/until.js'

/*
 * What each end of a request to the SMS webhook says about its message, on real connections. test/sms-codes.test.ts has what
 * follows from it for the code and its limits.
 */

const message = { mobile: '13900001111', code: '123456', ttlSeconds: 300, id: 'an-id' }

const folder = createTemporaryFolder()
t.teardown(() => rm(folder, { recursive: true }))

/** Creates a certificate for localhost that signs itself. */
function createCertificate(name: string, days: number) {
  const [key, request, cert] = ['key', 'csr', 'crt'].map((suffix) => join(folder, `${name}.${suffix}`)) as string[]
  const openssl = (...args: (string | undefined)[]) =>
    execFileSync('openssl', args.map(String), { stdio: 'ignore', cwd: folder })
  openssl('req', '-new', '-newkey', 'rsa:2048', '-nodes', '-subj', '/CN=localhost', '-keyout', key, '-out', request)
  openssl('x509', '-req', '-in', request, '-key', key, '-days', `${days}`, '-out', cert)
  return { key: readFileSync(`${key}`), cert: readFileSync(`${cert}`) }
}

const trusted = createCertificate('trusted', 1)
const expired = createCertificate('expired', -1)
const selfSigned = createCertificate('self-signed', 1)
globalAgent.options.ca = [trusted.cert, expired.cert]

/** Makes the time of a message short. */
function hurry(t: Test, ms = 700): void {
  const { timeout } = AbortSignal
  t.intercept(AbortSignal, 'timeout', { value: () => timeout.call(AbortSignal, ms) })
}

/** Sends the message. Returns the error if it fails. */
async function send(url: string, secret?: string): Promise<unknown> {
  return webhookSender(url, secret)(message).catch((error) => error)
}

/** What a server does with each connection. */
type Behaviour = (socket: Socket) => void

/** Starts a server that does the next of these with each connection, and the last one with all later ones. */
async function startServer(t: Test, server: net.Server, event: string, behaviours: Behaviour[]) {
  const seen = { connections: 0, requests: [] as string[] }
  const sockets = new Set<Socket>()
  server.on(event, (socket: Socket) => {
    const behaviour = behaviours[Math.min(seen.connections++, behaviours.length - 1)]
    socket.on('error', () => undefined)
    socket.on('data', (data) => seen.requests.push(`${data}`))
    behaviour?.(socket)
  })
  server.on('connection', (socket) => sockets.add(socket.on('error', () => undefined)))
  server.on('tlsClientError', () => undefined)
  await once(server.listen(0, '127.0.0.1'), 'listening')
  t.teardown(() => {
    for (const socket of sockets) socket.destroy()
    server.close()
  })
  const address = server.address()
  if (address === null || typeof address === 'string') throw new Error('no port')
  return { seen, port: address.port }
}

async function startTcp(t: Test, ...behaviours: Behaviour[]) {
  const { seen, port } = await startServer(t, net.createServer(), 'connection', behaviours)
  return { seen, http: `http://127.0.0.1:${port}/sms`, https: `https://localhost:${port}/sms` }
}

async function startTls(t: Test, certificate: { key: Buffer; cert: Buffer }, ...behaviours: Behaviour[]) {
  const { seen, port } = await startServer(t, tls.createServer(certificate), 'secureConnection', behaviours)
  return { seen, url: `https://localhost:${port}/sms` }
}

/** Answers each request with these bytes. */
const answer =
  (text: string): Behaviour =>
  (socket) =>
    socket.on('data', () => socket.write(text))
const status = (code: number) => answer(`HTTP/1.1 ${code} Any\r\nContent-Length: 0\r\n\r\n`)
const silence: Behaviour = () => undefined
/** Reads a request, and then ends the connection. */
const close: Behaviour = (socket) => socket.on('data', () => socket.destroy())
const reset: Behaviour = (socket) => socket.on('data', () => socket.resetAndDestroy())
const hangUp: Behaviour = (socket) => socket.destroy()

t.test('a message is one POST of JSON, signed if there is a secret, and no redirect is followed', async (t) => {
  const { seen, http } = await startTcp(t, status(200))
  t.equal(await send(http), undefined)
  const body = JSON.stringify({ mobile: message.mobile, code: message.code, ttl_s: 300, id: message.id })
  t.equal(seen.requests.length, 1)
  t.match(seen.requests[0], /^POST \/sms HTTP\/1\.1\r\n/)
  t.match(seen.requests[0], `\r\ncontent-type: application/json\r\n`)
  t.match(seen.requests[0], `\r\nContent-Length: ${body.length}\r\n`)
  t.ok(seen.requests[0]?.endsWith(`\r\n\r\n${body}`))
  t.notMatch(seen.requests[0], /x-signature/i)

  t.intercept(Date, 'now', { value: () => 1_800_000_000_999 })
  t.equal(await send(http, 'a secret'), undefined)
  const mac = createHmac('sha256', 'a secret').update(`1800000000.${body}`).digest('hex')
  t.match(seen.requests[1], `\r\nx-signature: t=1800000000,v1=${mac}\r\n`)
  t.equal(seen.connections, 1, 'the connection is used again')

  const redirecting = await startTcp(t, answer(`HTTP/1.1 307 Any\r\nLocation: ${http}\r\nContent-Length: 0\r\n\r\n`))
  t.match(await send(redirecting.http), { message: 'the SMS webhook answered 307' })
  t.equal(seen.requests.length, 2)
})

t.test('a 4xx says that the gateway refuses the message; any other answer that it may have been sent', async (t) => {
  for (const code of [302, 399, 500, 503]) {
    const { seen, http } = await startTcp(t, status(code))
    const error = await send(http)
    t.equal(seen.requests.length, 1)
    t.ok(error instanceof Error && !(error instanceof MessageNotSent), `${code}`)
    t.match(error, { message: `the SMS webhook answered ${code}` })
  }
  for (const code of [400, 499]) {
    const error = await send((await startTcp(t, status(code))).http)
    t.ok(error instanceof MessageRefused, `${code}`)
    t.match(error, { name: 'MessageRefused' })
  }
})

/** Listens with a backlog of one, and accepts nothing until it gets SIGCONT: further SYNs are dropped, as a firewall does. */
async function startFullBacklog(t: Test, host = '127.0.0.1', port = 0) {
  const script = `
    const answer = (socket) => socket.on('data', () => socket.end('HTTP/1.1 200 Any\\r\\nContent-Length: 0\\r\\n\\r\\n'))
    const server = net.createServer(answer)
    server.listen({ port: ${port}, host: '${host}', backlog: 1 }, () => console.log(server.address().port))`
  const child = spawn(process.execPath, ['-e', script], { stdio: ['ignore', 'pipe', 'inherit'] })
  t.teardown(() => child.kill('SIGKILL'))
  const actualPort = Number((await once(child.stdout, 'data'))[0])
  child.kill('SIGSTOP')
  const sockets: Socket[] = []
  t.teardown(() => {
    for (const socket of sockets) socket.destroy()
  })
  await until('the backlog is full', async () => {
    const socket = net.connect(actualPort, host)
    sockets.push(socket.on('error', () => undefined))
    const isConnected = once(socket, 'connect').then(() => true)
    return !(await Promise.race([isConnected, sleep(300, false)]))
  })
  return { child, port: actualPort }
}

/** Lets each look-up of a name end as the function says. */
function lookUp(t: Test, ...answerOf: [() => unknown[]] | []): void {
  t.intercept(dns, 'lookup', {
    value(_name: string, _options: unknown, callback: (...args: unknown[]) => void) {
      for (const answer of answerOf) setImmediate(() => callback(...answer()))
    }
  })
}

t.test('whatever fails before the request is written says that the message was not sent', async (t) => {
  const refusedUrl = `http://127.0.0.1:${await freePort()}/`
  const notFound = Object.assign(new Error('not found'), { code: 'ENOTFOUND' })
  const plain = await startTcp(t, status(200))
  const handshakeCut = await startTcp(t, close)
  const silent = await startTcp(t, silence)
  const [untrustedServer, expiredServer] = [
    await startTls(t, selfSigned, status(200)),
    await startTls(t, expired, status(200))
  ]
  const otherName = await startTls(t, trusted, status(200))

  for (const [name, url, reason, prepare] of [
    ['no listener', refusedUrl, 'ECONNREFUSED', undefined],
    [
      'no listener on any address of a name',
      refusedUrl.replace('127.0.0.1', 'gateway.example'),
      'ECONNREFUSED',
      (t: Test) =>
        lookUp(t, () => [
          null,
          [
            { address: '127.0.0.1', family: 4 },
            { address: '::1', family: 6 }
          ]
        ])
    ],
    ['the name does not exist', 'http://gateway.example/', 'ENOTFOUND', (t: Test) => lookUp(t, () => [notFound])],
    ['the name server is silent', 'http://gateway.example/', 'timeout', (t: Test) => lookUp(t)],
    ['a full backlog', `http://127.0.0.1:${(await startFullBacklog(t)).port}/sms`, 'timeout', undefined],
    ['a certificate of no CA', untrustedServer.url, 'DEPTH_ZERO_SELF_SIGNED_CERT', undefined],
    ['an expired certificate', expiredServer.url, 'CERT_HAS_EXPIRED', undefined],
    [
      'a certificate of another host',
      otherName.url.replace('localhost', '127.0.0.1'),
      'ERR_TLS_CERT_ALTNAME_INVALID',
      undefined
    ],
    ['plain HTTP where TLS is expected', plain.https, /SSL/, undefined],
    ['a handshake that is cut', handshakeCut.https, 'ECONNRESET', undefined],
    ['a handshake that hangs', silent.https, 'timeout', undefined]
  ] as const) {
    await t.test(name, async (t) => {
      hurry(t)
      prepare?.(t)
      const error = await send(url)
      t.ok(error instanceof MessageNotSent && !(error instanceof MessageRefused), `${error}`)
      const [, told = ''] = /^the SMS webhook did not answer: (.*)$/.exec(`${(error as Error).message}`) ?? []
      t.match(told, reason)
    })
  }
  for (const { seen } of [untrustedServer, expiredServer, otherName]) {
    t.strictSame(seen.requests, [], 'nobody could read the message')
  }
})

t.test('an address that cannot be reached does not hide one that is far away', async (t) => {
  const far = await startFullBacklog(t)
  const unreachable = await startFullBacklog(t, '127.0.0.2', far.port)
  lookUp(t, () => {
    // The first SYN is dropped, and the kernel sends the next one after a second.
    setTimeout(() => far.child.kill('SIGCONT'), 100)
    return [null, ['127.0.0.1', '127.0.0.2'].map((address) => ({ address, family: 4 }))]
  })
  t.equal(await send(`http://gateway.example:${unreachable.port}/`), undefined)
})

t.test('a connection that was never made is tried again, and only the second counts', async (t) => {
  for (const [second, expected] of [
    [status(200), undefined],
    [status(400), MessageRefused],
    [close, Error]
  ] as const) {
    const { seen, http } = await startTcp(t, second)
    const { lookup } = dns
    let lookups = 0
    t.intercept(dns, 'lookup', {
      value(name: string, options: dns.LookupAllOptions, callback: (...args: unknown[]) => void) {
        if (lookups++ > 0) lookup(name, options, callback)
        else setImmediate(callback, Object.assign(new Error('of the test'), { code: 'EAI_AGAIN' }))
      }
    })
    const error = await send(http.replace('127.0.0.1', 'localhost'))
    t.strictSame([lookups, seen.requests.length], [2, 1])
    if (expected === undefined) t.equal(error, undefined)
    else t.ok(error instanceof expected && (expected !== Error || !(error instanceof MessageNotSent)), `${error}`)
  }
})

t.test('a connection that broke is tried twice, and the message may have been sent, whatever follows', async (t) => {
  for (const [name, first] of Object.entries({ close, reset, hangUp })) {
    for (const second of [first, status(400), status(503)]) {
      const { seen, http } = await startTcp(t, first, second)
      const error = await send(http)
      t.equal(seen.connections, 2, name)
      t.ok(error instanceof Error && !(error instanceof MessageNotSent), `${name}: ${error}`)
    }
    t.equal(await send((await startTcp(t, first, status(200))).http), undefined, name)
  }
  const overTls = await startTls(t, trusted, close)
  const error = await send(overTls.url)
  t.equal(overTls.seen.requests.length, 2, 'over TLS')
  t.ok(error instanceof Error && !(error instanceof MessageNotSent))
  t.equal(await send((await startTls(t, trusted, status(200))).url), undefined)

  // The gateway restarts: nobody listens any more.
  const { seen, http } = await startTcp(t, close)
  const { port } = new URL(http)
  t.intercept(dns, 'lookup', {
    value(_name: string, _options: unknown, callback: (...args: unknown[]) => void) {
      const address = seen.connections === 0 ? '127.0.0.1' : '127.0.0.2'
      setImmediate(callback, null, [{ address, family: 4 }])
    }
  })
  const afterRestart = await send(`http://gateway.example:${port}/`)
  t.match(afterRestart, { message: 'the SMS webhook did not answer: ECONNREFUSED' })
  t.notOk(afterRestart instanceof MessageNotSent, 'the first may have been sent')
})

t.test('anything else is tried once, and the message may have been sent', async (t) => {
  hurry(t)
  for (const [name, behaviour, reason] of [
    ['no HTTP', answer('no HTTP\r\n\r\n'), /^HPE_/],
    ['no answer', silence, /^timeout$/],
    ['half an answer', answer('HTTP/1.1 200'), /^timeout$/],
    ['another protocol', answer('HTTP/1.1 101 Any\r\nConnection: upgrade\r\nUpgrade: other\r\n\r\n'), /./]
  ] as const) {
    const { seen, http } = await startTcp(t, behaviour)
    const error = await send(http)
    t.ok(error instanceof Error && !(error instanceof MessageNotSent), name)
    t.equal(seen.requests.length, 1, name)
    const [, told = ''] = /^the SMS webhook did not answer: (.*)$/.exec((error as Error).message) ?? []
    t.match(told, reason, name)
  }
})

t.test('an answer is read up to 64 KiB, so that its connection can be reused', async (t) => {
  const ok = (length: number, sent = length) =>
    answer(`HTTP/1.1 200 Any\r\nContent-Length: ${length}\r\n\r\n${'x'.repeat(sent)}`)
  const short = await startTcp(t, ok(65_536))
  await until('a connection is used again', async () => {
    t.equal(await send(short.http), undefined)
    return short.seen.requests.length > short.seen.connections
  })
  const long = await startTcp(t, ok(10_000_000, 200_000))
  for (let n = 0; n < 2; n++) t.equal(await send(long.http), undefined)
  t.equal(long.seen.connections, 2, 'the rest of a longer one is not')
  const broken = await startTcp(t, (socket) =>
    socket.on('data', () => socket.write('HTTP/1.1 200 Any\r\nContent-Length: 9\r\n\r\nx', () => socket.destroy()))
  )
  t.equal(await send(broken.http), undefined, 'only the status counts')
})
