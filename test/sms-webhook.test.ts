import { execFileSync, spawn } from 'node:child_process'
import dns from 'node:dns'
import { once } from 'node:events'
import { readFileSync } from 'node:fs'
import { globalAgent as httpAgent } from 'node:http'
import { globalAgent } from 'node:https'
import net, { type Socket } from 'node:net'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import tls from 'node:tls'
import { Webhook } from 'standardwebhooks'
import t, { type Test } from 'tap'
import { GatewayBreaker } from '#src/codes/gateway-breaker.js'
import { MessageNotSent, MessageRefused } from '#src/codes/senders/sender.js'
import { webhookSender } from '#src/codes/senders/webhook.js'
import { freePort } from '../dev/embedded-stores.js'
import { temporaryFolderFor } from '../testkit/temporary-folder.js'
import { until } from '../testkit/until.js'

/*
 * What each end of a request to the SMS webhook says about its message, on real connections, and when a webhook that fails gets no
 * messages. test/sms-codes.test.ts has what follows for a code and its limits.
 */

const message = {
  mobile: '13900001111',
  code: '123456',
  ttlSeconds: 300,
  id: 'an-id',
  purpose: 'password',
  language: 'en'
} as const

const folder = temporaryFolderFor(t)

const key = join(folder, 'key')
const openssl = (...args: string[]) => execFileSync('openssl', args, { stdio: 'ignore', cwd: folder })
openssl('ecparam', '-name', 'prime256v1', '-genkey', '-noout', '-out', key)

/** Creates a certificate for localhost that signs itself. */
function createCertificate(name: string) {
  openssl('req', '-x509', '-new', '-subj', `/CN=localhost/O=${name}`, '-key', key, '-days', '1', '-out', `${name}.crt`)
  return { key: readFileSync(key), cert: readFileSync(join(folder, `${name}.crt`)) }
}

const [trusted, untrusted] = [createCertificate('trusted'), createCertificate('untrusted')]
globalAgent.options.ca = [trusted.cert]

/** Makes the time of an attempt short. */
function hurry(t: Test): void {
  const { setTimeout } = globalThis
  t.intercept(globalThis, 'setTimeout', { value: (end: () => void, ms: number) => setTimeout(end, Math.min(ms, 700)) })
}

/** Sends the message. Returns what is known of it, and why it failed. */
async function send(url: string, secret?: string): Promise<[end: string, reason: string]> {
  const error = await webhookSender(url, secret)(message).catch((error) => error)
  if (error === undefined) return ['sent', '']
  const reason = error.message.replace(/^the SMS webhook (did not answer: |answered )/, '')
  if (error instanceof MessageRefused) return ['refused', reason]
  return [error instanceof MessageNotSent ? 'not sent' : 'may be sent', reason]
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
  const { port } = server.address() as net.AddressInfo
  return { seen, http: `http://127.0.0.1:${port}/sms`, https: `https://localhost:${port}/sms` }
}

const startTcp = (t: Test, ...behaviours: Behaviour[]) => startServer(t, net.createServer(), 'connection', behaviours)
const startTls = (t: Test, certificate: { key: Buffer; cert: Buffer }, ...behaviours: Behaviour[]) =>
  startServer(t, tls.createServer(certificate), 'secureConnection', behaviours)

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

t.test('a message is one POST of JSON, signed if there is a secret', async (t) => {
  const { seen, http } = await startTcp(t, status(200))
  t.strictSame(await send(http), ['sent', ''])
  const { mobile, code, id, purpose, language } = message
  const body = JSON.stringify({ mobile, code, ttl_s: 300, id, purpose, language })
  t.equal(seen.requests.length, 1)
  t.match(seen.requests[0], /^POST \/sms HTTP\/1\.1\r\n/)
  t.match(seen.requests[0], `\r\ncontent-type: application/json\r\n`)
  t.match(seen.requests[0], `\r\nContent-Length: ${body.length}\r\n`)
  t.ok(seen.requests[0]?.endsWith(`\r\n\r\n${body}`))
  t.match(seen.requests[0], `\r\nwebhook-id: ${id}\r\n`, 'by which a receiver drops duplicates')
  t.notMatch(seen.requests[0], /webhook-signature/i)

  await send(http, 'a secret')
  const headers = Object.fromEntries((seen.requests[1] ?? '').split('\r\n').map((line) => line.split(': ')))
  t.strictSame(new Webhook('a secret', { format: 'raw' }).verify(body, headers), JSON.parse(body))
  t.equal(seen.connections, 1, 'the connection is used again')
})

t.test('an answer counts although its body does not end, and its connection is closed', async (t) => {
  const { http } = await startTcp(t, answer('HTTP/1.1 200 Any\r\nTransfer-Encoding: chunked\r\n\r\n'))
  t.strictSame(await send(http), ['sent', ''])
  t.equal(Object.values(httpAgent.sockets).flat().length, 0)
})

t.test('a 4xx refuses the message; any other answer, or none: it may have been sent, once', async (t) => {
  hurry(t)
  for (const [behaviour, end, reason] of [
    [status(400), 'refused', /^400$/],
    [status(499), 'refused', /^499$/],
    [answer('HTTP/1.1 307 Any\r\nLocation: /\r\nContent-Length: 0\r\n\r\n'), 'may be sent', /^307$/],
    [status(399), 'may be sent', /^399$/],
    [status(500), 'may be sent', /^500$/],
    [answer('no HTTP\r\n\r\n'), 'may be sent', /^HPE_/],
    [silence, 'may be sent', /^timeout$/],
    [answer('HTTP/1.1 200'), 'may be sent', /^timeout$/],
    [answer('HTTP/1.1 101 Any\r\nConnection: upgrade\r\nUpgrade: other\r\n\r\n'), 'may be sent', /./]
  ] as const) {
    const { seen, http } = await startTcp(t, behaviour)
    t.match(await send(http), [end, reason])
    t.equal(seen.requests.length, 1)
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

/** Lets each look-up of these names end as their functions say; undefined: never. */
function lookUp(t: Test, names: Record<string, (() => unknown[]) | undefined>): void {
  const { lookup } = dns
  t.intercept(dns, 'lookup', {
    value(name: string, ...args: unknown[]) {
      if (!(name in names)) return Reflect.apply(lookup, dns, [name, ...args])
      const result = names[name]
      if (result) setImmediate(() => Reflect.apply(args.at(-1) as () => void, undefined, result()))
    }
  })
}

const found = (...addresses: string[]) => [null, addresses.map((address) => ({ address, family: net.isIP(address) }))]
const failed = (code: string) => [Object.assign(new Error('of the test'), { code })]

t.test('whatever fails before the request is written: the message was certainly not sent', async (t) => {
  const [noCa, otherHost] = [await startTls(t, untrusted, status(200)), await startTls(t, trusted, status(200))]
  const port = await freePort()
  hurry(t)
  lookUp(t, {
    'two.example': () => found('127.0.0.1', '::1'),
    'unknown.example': () => failed('ENOTFOUND'),
    'silent.example': undefined
  })
  for (const [name, url, reason] of [
    ['no listener', `http://127.0.0.1:${port}/`, 'ECONNREFUSED'],
    ['no listener on any address of a name', `http://two.example:${port}/`, 'ECONNREFUSED'],
    ['no such name', 'http://unknown.example/', 'ENOTFOUND'],
    ['a silent name server', 'http://silent.example/', 'timeout'],
    ['a full backlog', `http://127.0.0.1:${(await startFullBacklog(t)).port}/sms`, 'timeout'],
    ['a certificate of no CA', noCa.https, 'DEPTH_ZERO_SELF_SIGNED_CERT'],
    ['a certificate of another host', otherHost.https.replace('localhost', '127.0.0.1'), /ALTNAME_INVALID/],
    ['plain HTTP where TLS is expected', (await startTcp(t, status(200))).https, /SSL/],
    ['a handshake that is cut', (await startTcp(t, close)).https, 'ECONNRESET'],
    ['a handshake that hangs', (await startTcp(t, silence)).https, 'timeout']
  ] as const) {
    t.match(await send(url), ['not sent', reason], name)
  }
  for (const { seen } of [noCa, otherHost]) t.strictSame(seen.requests, [], 'nobody could read it')
})

t.test('an address that cannot be reached does not hide one that is far away', async (t) => {
  const far = await startFullBacklog(t)
  const unreachable = await startFullBacklog(t, '127.0.0.2', far.port)
  function findAndAccept() {
    // The first SYN is dropped, and the kernel sends the next one after a second.
    setTimeout(() => far.child.kill('SIGCONT'), 100)
    return found('127.0.0.1', '127.0.0.2')
  }
  lookUp(t, { 'gateway.example': findAndAccept })
  t.strictSame(await send(`http://gateway.example:${unreachable.port}/`), ['sent', ''])
})

t.test('a connection that was never made is tried again, and only the second counts', async (t) => {
  for (const [second, end] of [
    [status(200), 'sent'],
    [status(400), 'refused'],
    [close, 'may be sent']
  ] as const) {
    const { seen, http } = await startTcp(t, second)
    let lookups = 0
    lookUp(t, { 'gateway.example': () => (lookups++ === 0 ? failed('EAI_AGAIN') : found('127.0.0.1')) })
    t.equal((await send(http.replace('127.0.0.1', 'gateway.example')))[0], end)
    t.strictSame([lookups, seen.requests.length], [2, 1])
  }
})

t.test('a connection that broke is tried twice with one id, and then the message may have been sent', async (t) => {
  for (const [name, first] of Object.entries({ close, reset, hangUp })) {
    for (const [second, end] of [
      [first, 'may be sent'],
      [status(400), 'may be sent'],
      [status(503), 'may be sent'],
      [status(200), 'sent']
    ] as const) {
      const { seen, http } = await startTcp(t, first, second)
      t.equal((await send(http))[0], end, name)
      t.equal(seen.connections, 2, name)
      t.ok(new Set(seen.requests).size <= 1, name)
    }
  }
  const overTls = await startTls(t, trusted, close)
  t.equal((await send(overTls.https))[0], 'may be sent')
  t.equal(overTls.seen.requests.length, 2, 'over TLS')
  t.equal((await send((await startTls(t, trusted, status(200))).https))[0], 'sent')

  // The gateway restarts: nobody listens any more.
  const { seen, http } = await startTcp(t, close)
  lookUp(t, { 'gateway.example': () => found(seen.connections === 0 ? '127.0.0.1' : '127.0.0.2') })
  t.strictSame(await send(http.replace('127.0.0.1', 'gateway.example')), ['may be sent', 'ECONNREFUSED'])
})

t.test('the breaker', async (t) => {
  let now = 1_000_000
  t.intercept(performance, 'now', { value: () => now })

  /** Each letter is a message: the mobile `a` fails, `A` succeeds; a number: so many ms pass. `!` follows what opens the breaker. */
  for (const [name, script] of Object.entries({
    'the fifth mobile that fails opens it': 'abcde!',
    'a mobile counts once, with its last result': 'aaaaaaaa bcd D e d!',
    'half of the mobiles must fail: 5 of 11 are less, 6 of 12 are not': 'GHIJKL abcde f!',
    '5 of 10 are half': 'GHIJK abcde!',
    'successes count for 10 s': 'GHIJK 5000 abc 4999 d 1 e!',
    'failures count for 10 s': 'abcd 10000 e abc d!',
    'the pause lasts 5 s, its results do not count, and after it all begins again': 'abcde! 4000 abcdefgh 1000 abcd e!'
  })) {
    const breaker = new GatewayBreaker()
    for (const [step] of script.matchAll(/\d+|[a-z]!?/gi)) {
      const [mobile = ''] = step
      if (/\d/.test(mobile)) now += Number(step)
      else {
        const hasOpened = breaker.record(mobile.toLowerCase(), mobile >= 'a')
        t.equal(hasOpened, step.endsWith('!'), `${name}: ${step}`)
      }
    }
    t.equal(breaker.remainingPauseMs, 5_000, name)
    now += 5_001
    t.equal(breaker.remainingPauseMs, 0, name)
  }
})
