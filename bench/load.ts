import { randomInt } from 'node:crypto'
import { once } from 'node:events'
import { connect, type Socket } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import autocannon from 'autocannon'
import type { Redis } from 'ioredis'
import type { Subject } from './lab.js'

export const signUpPath = '/api/v1.0/users'

/** A reply, or its absence (status 0): the connection ended, or nothing came for ten seconds. */
export interface Reply {
  status: number
  ms: number
}

/** Mobiles count up from a random one, so that no two runs share any. */
let nextMobile = 13_000_000_000 + randomInt(5_000_000_000)

/** The bodies of so many sign-ups that will succeed: their codes are in Redis. */
export async function issueSignUps(redis: Redis, count: number): Promise<string[]> {
  const bodies: string[] = []
  while (bodies.length < count) {
    const pipeline = redis.pipeline()
    for (let n = 0; n < 1_000 && bodies.length < count; n++) {
      const mobile = `${nextMobile++}`
      pipeline.set(`sms_code_${mobile}`, '123456', 'EX', 3_600)
      bodies.push(
        JSON.stringify({ mobile, sms_code: '123456', password: 'a bench password', password2: 'a bench password' })
      )
    }
    await pipeline.exec()
  }
  return bodies
}

/** Whose sign-up a body is. */
export const mobileOf = (body: string): string => JSON.parse(body).mobile

export interface ClosedLoop {
  perSecond: number
  /** The subject's CPU for one reply, in milliseconds. */
  cpuMs: number
  replies: Reply[]
}

/** The longest wait for a reply: well past HASH_MAX_WAIT_MS and three timeouts of a store. */
const replyTimeoutMs = 10_000

/** The first part of a run, which is not counted: connections open, queues fill. */
const rampMs = 500

/**
 * So many connections that each send the next request when the last is answered. The clock and the counts are this
 * function's own: autocannon rounds its duration to whole seconds.
 *
 * @param bodies one for each request, in turn, again from the start when they end
 */
export async function closedLoop(
  subject: Subject,
  options: { connections: number; seconds: number; bodies: readonly string[]; path?: string }
): Promise<ClosedLoop> {
  const { connections, seconds, bodies, path = signUpPath } = options
  let sent = 0
  let replies: Reply[] = []
  const load = autocannon(
    {
      url: subject.url,
      connections,
      // Until it is stopped.
      duration: 3_600,
      requests: [
        {
          method: 'POST',
          path,
          headers: { 'content-type': 'application/json' },
          setupRequest: (request) => ({ ...request, body: bodies[sent++ % bodies.length] ?? '' })
        }
      ]
    },
    () => undefined
  )
  load.on('response', (_client, status, _bytes, ms) => replies.push({ status, ms }))

  await sleep(rampMs)
  replies = []
  const [startedAt, cpuBefore] = [performance.now(), subject.cpuMs()]
  await sleep(seconds * 1_000)
  const [elapsedMs, cpu, counted] = [performance.now() - startedAt, subject.cpuMs() - cpuBefore, replies]
  load.stop()
  await once(load, 'done')
  return { perSecond: (counted.length * 1_000) / elapsedMs, cpuMs: cpu / counted.length, replies: counted }
}

/**
 * So many requests a second, whatever becomes of them: each is sent at its time, and its latency counts from then, so
 * that a stall of the subject, or of this process, is not left out.
 */
export async function openLoop(
  subject: Subject,
  options: { perSecond: number; seconds: number; bodies: readonly string[] }
): Promise<Reply[]> {
  const { perSecond, seconds, bodies } = options
  const { hostname, port } = new URL(subject.url)
  const idle: Socket[] = []
  const startAt = performance.now()
  const replies: Promise<Reply>[] = []
  const count = Math.round(perSecond * seconds)
  while (replies.length < count) {
    const dueAt = startAt + (replies.length * 1_000) / perSecond
    const earlyMs = dueAt - performance.now()
    if (earlyMs > 0) await sleep(earlyMs)
    else
      replies.push(
        send(idle, { host: hostname, port: Number(port) }, bodies[replies.length % bodies.length] ?? '', dueAt)
      )
  }
  const all = await Promise.all(replies)
  for (const socket of idle) socket.destroy()
  return all
}

/**
 * One request on an idle connection, or a new one. By hand, because node:http's client would take a good part of the two
 * cores; the service's replies all have a Content-Length and a short body.
 */
function send(idle: Socket[], address: { host: string; port: number }, body: string, dueAt: number): Promise<Reply> {
  const socket = takeIdle(idle) ?? connect({ ...address, noDelay: true }).on('error', ignore)
  return new Promise((resolve) => {
    let text = ''
    function end(status: number): void {
      clearTimeout(timeout)
      socket.off('data', read).off('close', fail)
      if (status > 0) idle.push(socket)
      else socket.destroy()
      resolve({ status, ms: performance.now() - dueAt })
    }
    function read(chunk: Buffer): void {
      text += chunk.toString('latin1')
      const headEnd = text.indexOf('\r\n\r\n')
      if (headEnd < 0) return
      const length = Number(/content-length: (\d+)/i.exec(text)?.[1])
      if (text.length >= headEnd + 4 + length) end(Number(text.slice(9, 12)))
    }
    const fail = () => end(0)
    const timeout = setTimeout(fail, replyTimeoutMs)
    socket.on('data', read).once('close', fail)
    socket.write(
      `POST ${signUpPath} HTTP/1.1\r\nHost: ${address.host}\r\nContent-Type: application/json\r\n` +
        `Content-Length: ${Buffer.byteLength(body)}\r\n\r\n${body}`
    )
  })
}

/** An error is followed by 'close', which says enough. */
const ignore = () => undefined

/** A connection that has not ended while it was idle. */
function takeIdle(idle: Socket[]): Socket | undefined {
  const socket = idle.pop()
  return socket?.destroyed ? takeIdle(idle) : socket
}
