import { randomInt } from 'node:crypto'
import { once } from 'node:events'
import { Agent, request } from 'node:http'
import { setTimeout as sleep } from 'node:timers/promises'
import autocannon from 'autocannon'
import type { Redis } from 'ioredis'
import type { Subject } from './lab.js'

export const signUpPath = '/api/v1.0/users'

/** A reply, or its absence (status 0). */
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

export interface ClosedLoop {
  perSecond: number
  /** The subject's CPU for one reply, in milliseconds. */
  cpuMs: number
  replies: Reply[]
}

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
  const agent = new Agent({ keepAlive: true })
  const startAt = performance.now()
  const replies: Promise<Reply>[] = []
  const count = Math.round(perSecond * seconds)
  while (replies.length < count) {
    const dueAt = startAt + (replies.length * 1_000) / perSecond
    if (dueAt > performance.now()) await sleep(1)
    else replies.push(send(subject, agent, bodies[replies.length % bodies.length] ?? '', dueAt))
  }
  const all = await Promise.all(replies)
  agent.destroy()
  return all
}

function send(subject: Subject, agent: Agent, body: string, dueAt: number): Promise<Reply> {
  return new Promise((resolve) => {
    const answered = (status: number) => resolve({ status, ms: performance.now() - dueAt })
    const headers = { 'content-type': 'application/json', 'content-length': Buffer.byteLength(body) }
    const sent = request(`${subject.url}${signUpPath}`, { method: 'POST', agent, headers }, (reply) => {
      reply.resume().once('end', () => answered(reply.statusCode ?? 0))
    })
    sent.once('error', () => answered(0))
    sent.end(body)
  })
}
