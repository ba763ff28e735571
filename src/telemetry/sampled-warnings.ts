import type { FastifyBaseLogger } from 'fastify'

/** How long after a line those like it are only counted. */
const intervalMs = 10_000

/** More messages than a store has, unless they quote something of a request, such as a slot of a Cluster. */
const messagesMax = 100

/**
 * Returns a function that logs errors: one line in 10 s for each message. So the log does not grow with the traffic while a
 * store is away. The next line has the number of those that were left out, as `suppressed`.
 */
export function sampledWarnings(log: FastifyBaseLogger) {
  const samples = new Map<string, { loggedAt: number; suppressed: number }>()
  return function warn(err: Error, message: string): void {
    const text = `${message}: ${err.message}`
    const key = samples.has(text) || samples.size < messagesMax ? text : 'other messages'
    const sample = samples.get(key)
    const now = performance.now()
    if (sample !== undefined && now - sample.loggedAt < intervalMs) {
      sample.suppressed++
      return
    }
    samples.set(key, { loggedAt: now, suppressed: 0 })
    log.warn({ err, ...(sample?.suppressed && { suppressed: sample.suppressed }) }, message)
  }
}
