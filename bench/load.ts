import { once } from 'node:events'
import { setTimeout as sleep } from 'node:timers/promises'
import autocannon from 'autocannon'
import type { Redis } from 'ioredis'
import { cpuMs, mainThreadMs } from './process-usage.js'
import { issueSignUps } from './request-bodies.js'
import type { Server } from './system-under-test.js'

/** Enough that no hash thread is ever idle. */
export const connections = 32

/** The start of a closed loop, which is not counted: connections open and queues fill. */
const rampMs = 500

export interface Reply {
  /** 0 if the connection closed or the reply timed out. */
  status: number
  ms: number
}

/** What a connection remembers of one request for the next. */
interface Context {
  mobile?: string
  ticket?: string
}

/** A POST that each connection sends in turn with the others. */
export interface LoadRequest {
  path: string
  body(context: Context): string
  onReply?(body: string, context: Context): void
}

/**
 * Sends requests on a number of connections. Each connection sends its next request when it has received the reply. Time
 * and replies are counted here, because autocannon rounds its duration to whole seconds.
 *
 * @param load.bodies of sign-ups. They are sent in order, and from the start again when all were sent.
 */
export async function closedLoop(
  { url, process: service }: Server,
  load: { seconds: number } & ({ bodies: readonly string[] } | { requests: readonly LoadRequest[] })
) {
  let sent = 0
  const signUp = (bodies: readonly string[]): LoadRequest => {
    return { path: '/api/v1.0/users', body: () => bodies[sent++ % bodies.length] ?? '' }
  }
  const requests = 'requests' in load ? load.requests : [signUp(load.bodies)]
  let replies: Reply[] = []
  const options: autocannon.Options = {
    url,
    connections,
    // Longer than any measurement; `stop` ends it.
    duration: 3_600,
    requests: requests.map(({ path, body, onReply }) => ({
      method: 'POST',
      path,
      headers: { 'content-type': 'application/json' },
      setupRequest: (request, context) => ({ ...request, body: body(context) }),
      ...(onReply && { onResponse: (_status, reply, context) => onReply(reply, context) })
    }))
  }
  const cannon = autocannon(options, () => undefined)
  cannon.on('response', (_client, status, _bytes, ms) => replies.push({ status, ms }))

  await sleep(rampMs)
  replies = []
  const [startedAt, cpuMsBefore, eventLoopMsBefore] = [performance.now(), cpuMs(service), mainThreadMs(service)]
  await sleep(load.seconds * 1_000)
  const counted = replies
  const result = {
    replies: counted,
    perSecond: (counted.length * 1_000) / (performance.now() - startedAt),
    /** CPU time of the server for each reply, in ms, and the part of it that the event loop has taken. */
    cpuMs: (cpuMs(service) - cpuMsBefore) / counted.length,
    eventLoopMs: (mainThreadMs(service) - eventLoopMsBefore) / counted.length
  }
  cannon.stop()
  await once(cannon, 'done')
  return result
}

/** Signs up until V8 has optimized much of the service, and its connections to the stores are open. */
export async function warmUp(server: Server, redis: Redis, seconds = 5): Promise<void> {
  await closedLoop(server, { seconds, bodies: await issueSignUps(redis, 800 * seconds) })
}

/** @throws {Error} if a reply has another status, because then something else was measured */
export function requireStatus(replies: readonly Reply[], expected: number, requests: string): void {
  const others = replies.filter(({ status }) => status !== expected)
  if (others.length === 0) return
  const statuses = [...new Set(others.map(({ status }) => status))].join(', ')
  throw new Error(`${others.length} of ${replies.length} ${requests} were answered ${statuses} instead of ${expected}`)
}
