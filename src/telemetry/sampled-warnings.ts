import type { FastifyBaseLogger } from 'fastify'

/** More kinds than there are, unless messages quote something of a request, such as a slot of a Cluster. The others are one. */
const kindsMax = 100

/**
 * Returns a function that decides on each line of a kind: `linesMax` are written from the first in an interval, and the others
 * counted.
 *
 * @returns how many were left out before this line, or undefined if it is left out itself
 */
export function sampler(linesMax: number, intervalMs: number) {
  const kinds = new Map<string, { since: number; lines: number; suppressed: number }>()
  return function sample(name: string): number | undefined {
    const kind = kinds.has(name) || kinds.size < kindsMax ? name : 'others'
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
  const sample = sampler(1, 10_000)
  return function warn(err: Error, message: string): void {
    const suppressed = sample(`${message}: ${err.message}`)
    if (suppressed !== undefined) log.warn({ err, ...(suppressed > 0 && { suppressed }) }, message)
  }
}
