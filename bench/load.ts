import { once } from 'node:events'
import { connect, type Socket } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import autocannon from 'autocannon'
import type { Redis } from 'ioredis'
import { issueSignUps } from './request-bodies.js'
import type { Server } from './system-under-test.js'

const signUpPath = '/api/v1.0/users'

/** What a connection knows of its last journey. */
export interface Journey {
  mobile?: string
  ticket?: string
}

/** A POST that each connection sends in turn with the others. */
export interface LoadRequest {
  path: string
  body(context: Journey): string
  onReply?(body: string, context: Journey): void
}

/** The number of connections for P1 to P4 and P6: enough that no hash thread is ever idle. */
export const saturatingConnections = 32

/** Well above a lease. */
const replyTimeoutMs = 10_000

/** The start of a closed loop, which is not counted: connections open and queues fill. */
const rampMs = 500

export interface Reply {
  /** 0 if the connection closed or the reply timed out. */
  status: number
  ms: number
}

export interface ClosedLoopResult {
  perSecond: number
  /** For how long replies were counted. */
  seconds: number
  /** CPU time of the server for each reply, in milliseconds. */
  cpuMs: number
  /** The part of `cpuMs` that the event loop has taken. */
  eventLoopMs: number
  replies: Reply[]
}

/**
 * Sends requests on a number of connections. Each connection sends its next request when it has received the reply. Time
 * and replies are counted here, because autocannon rounds its duration to whole seconds.
 *
 * @param options.bodies of sign-ups. They are sent in order, and from the start again when all were sent.
 */
export async function closedLoop(
  server: Server,
  options: { seconds: number } & ({ bodies: readonly string[] } | { requests: readonly LoadRequest[] })
): Promise<ClosedLoopResult> {
  let sent = 0
  const requests =
    'requests' in options
      ? options.requests
      : [{ path: signUpPath, body: () => options.bodies[sent++ % options.bodies.length] ?? '' }]
  let replies: Reply[] = []
  const load = autocannon(
    {
      url: server.url,
      connections: saturatingConnections,
      // Longer than any measurement; `stop` ends it.
      duration: 3_600,
      requests: requests.map(({ path, body, onReply }: LoadRequest) => ({
        method: 'POST',
        path,
        headers: { 'content-type': 'application/json' },
        setupRequest: (request, context) => ({ ...request, body: body(context) }),
        ...(onReply && { onResponse: (_status, reply, context) => onReply(reply, context) })
      }))
    },
    () => undefined
  )
  load.on('response', (_client, status, _bytes, ms) => replies.push({ status, ms }))

  await sleep(rampMs)
  replies = []
  const { process: service } = server
  const [startedAt, cpuMsBefore, eventLoopMsBefore] = [performance.now(), service.cpuMs(), service.mainThreadMs()]
  await sleep(options.seconds * 1_000)
  const counted = replies
  const seconds = (performance.now() - startedAt) / 1_000
  const result = {
    perSecond: counted.length / seconds,
    seconds,
    cpuMs: (service.cpuMs() - cpuMsBefore) / counted.length,
    eventLoopMs: (service.mainThreadMs() - eventLoopMsBefore) / counted.length,
    replies: counted
  }
  load.stop()
  await once(load, 'done')
  return result
}

/** Signs up for five seconds, so that V8 has optimized much of the service, and its connections to the stores are open. */
export async function warmUp(service: Server, redis: Redis): Promise<void> {
  await closedLoop(service, { seconds: 5, bodies: await issueSignUps(redis, 4_000) })
}

/** @throws {Error} if a reply has another status, because then something else was measured */
export function requireStatus(replies: readonly Reply[], expected: number, requests: string): void {
  const others = replies.filter(({ status }) => status !== expected)
  if (others.length === 0) return
  const statuses = [...new Set(others.map(({ status }) => status))].join(', ')
  throw new Error(`${others.length} of ${replies.length} ${requests} were answered ${statuses} instead of ${expected}`)
}

/**
 * Sends sign-ups at a constant rate, whether or not earlier ones have been answered. A latency counts from the scheduled
 * start, so that it includes stalls of the server and of this process (no coordinated omission).
 *
 * @param options.bodies are sent in order, and from the start again when all were sent
 * @returns the replies in the order of the requests
 */
export async function openLoop(
  server: Server,
  options: { perSecond: number; seconds: number; bodies: readonly string[] }
): Promise<Reply[]> {
  const { perSecond, seconds, bodies } = options
  const { hostname: host, port } = new URL(server.url)
  const address = { host, port: Number(port) }
  const idleSockets: Socket[] = []
  const replies: Promise<Reply>[] = []
  const count = Math.round(perSecond * seconds)
  const startAt = performance.now()
  while (replies.length < count) {
    const scheduledAt = startAt + (replies.length * 1_000) / perSecond
    const delayMs = scheduledAt - performance.now()
    if (delayMs > 0) await sleep(delayMs)
    else replies.push(signUp(address, idleSockets, bodies[replies.length % bodies.length] ?? '', scheduledAt))
  }
  const received = await Promise.all(replies)
  for (const socket of idleSockets) socket.destroy()
  return received
}

/**
 * Sends one sign-up on an idle connection, or on a new one. It reads and writes HTTP itself, because node:http would take
 * much of the CPU that the server under test needs. It relies on short replies with a Content-Length.
 */
function signUp(
  address: { host: string; port: number },
  idleSockets: Socket[],
  body: string,
  scheduledAt: number
): Promise<Reply> {
  // An error is followed by 'close'.
  const socket = takeIdle(idleSockets) ?? connect({ ...address, noDelay: true }).on('error', () => undefined)
  return new Promise((resolve) => {
    let text = ''
    function finish(status: number): void {
      clearTimeout(timeout)
      socket.off('data', read).off('close', fail)
      if (status > 0) idleSockets.push(socket)
      else socket.destroy()
      resolve({ status, ms: performance.now() - scheduledAt })
    }
    function read(chunk: Buffer): void {
      text += chunk.toString('latin1')
      const headEnd = text.indexOf('\r\n\r\n')
      if (headEnd < 0) return
      const length = Number(/content-length: (\d+)/i.exec(text)?.[1])
      if (text.length >= headEnd + 4 + length) finish(Number(text.slice('HTTP/1.1 '.length, 'HTTP/1.1 200'.length)))
    }
    const fail = () => finish(0)
    const timeout = setTimeout(fail, replyTimeoutMs)
    socket.on('data', read).once('close', fail)
    socket.write(
      `POST ${signUpPath} HTTP/1.1\r\nHost: ${address.host}\r\nContent-Type: application/json\r\n` +
        `Content-Length: ${Buffer.byteLength(body)}\r\n\r\n${body}`
    )
  })
}

/** Returns an idle connection that is still open. */
function takeIdle(idleSockets: Socket[]): Socket | undefined {
  const socket = idleSockets.pop()
  return socket?.destroyed ? takeIdle(idleSockets) : socket
}
