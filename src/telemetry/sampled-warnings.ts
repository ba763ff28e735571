import type { FastifyBaseLogger } from 'fastify'

/** More messages than a store has, unless they quote something of a request, such as a slot of a Cluster. */
const messagesMax = 100

/**
 * Returns a function that decides on each line of a kind: `linesMax` are written from the first in an interval, and the others
 * counted.
 *
 * @returns how many were left out before this line, or undefined if it is left out itself
 */
export function sampler(linesMax: number, intervalMs: number) {
  const kinds = new Map<string, { since: number; lines: number; suppressed: number }>()
  return function sample(kind: string): number | undefined {
    const last = kinds.get(kind)
    const now = performance.now()
    if (last === undefined || now - last.since >= intervalMs) {
      kinds.set(kind, { since: now, lines: 1, suppressed: 0 })
      return last?.suppressed ?? 0
    }
    if (last.lines < linesMax) {
      last.lines++
      return 0
    }
    last.suppressed++
    return undefined
  }
}

/**
 * Returns a function that logs errors: one line in 10 s for each message. So the log does not grow with the traffic while a
 * store is away. The next line has the number of those that were left out, as `suppressed`.
 */
export function sampledWarnings(log: FastifyBaseLogger) {
  const messages = new Set<string>()
  const sample = sampler(1, 10_000)
  return function warn(err: Error, message: string): void {
    const text = `${message}: ${err.message}`
    if (messages.size < messagesMax) messages.add(text)
    const suppressed = sample(messages.has(text) ? text : 'other messages')
    if (suppressed !== undefined) log.warn({ err, ...(suppressed > 0 && { suppressed }) }, message)
  }
}
