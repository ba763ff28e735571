/** A wait on it is a sleep. */
const neverNotified = new Int32Array(new SharedArrayBuffer(Int32Array.BYTES_PER_ELEMENT))

/** The part of the slack that a sleep may take. The rest is for hashes that end early. */
const shareOfSlack = 0.8

/** So that requests that need no hash, such as probes, are answered soon however long a hash takes. */
const longestSleepMs = 10

/** After a sleep, timeouts come before replies that are there already. So a sleep takes little of a timeout. */
const shareOfTimeout = 0.05

/** A shorter sleep would save too few wake-ups. */
const shortestSleepMs = 1

/**
 * Event coalescing: while hashes are queued, the event loop sleeps for some milliseconds whenever it has nothing to do. Then
 * it handles everything that has arrived meanwhile. Network cards do this with interrupts (interrupt moderation).
 *
 * On a machine whose cores all hash, each wake-up of the event loop interrupts a hash. Hashes stream their memory through the
 * CPU caches, so after each wake-up the event loop has to load its code and data from memory again. Fewer wake-ups take less
 * CPU time. docs/performance.md has the measurements.
 */
export class EventCoalescing {
  private isActive = false
  /** How many events the event loop had handled when a pass last ended. */
  private eventsAtLastPass = 0

  /**
   * @param slackMs returns how long the event loop may stay away now, in milliseconds; 0 ends the sleeps
   * @param timeoutMs the shortest timeout of the process
   */
  constructor(
    private readonly slackMs: () => number,
    private readonly timeoutMs: number
  ) {}

  /** Sleeps whenever the event loop has nothing to do, as long as there is slack. */
  start(): void {
    if (this.isActive) return
    this.isActive = true
    setImmediate(this.endPass)
  }

  /** Runs at the end of each pass. While an immediate is pending, the next pass does not wait for events. */
  private readonly endPass = (): void => {
    const sleepMs = Math.min(shareOfSlack * this.slackMs(), shareOfTimeout * this.timeoutMs, longestSleepMs)
    this.isActive = sleepMs >= shortestSleepMs
    if (!this.isActive) return
    const { events } = performance.nodeTiming.uvMetricsInfo
    // Not after a pass with events, because more may be there: libuv accepts one connection in each pass.
    if (events === this.eventsAtLastPass) Atomics.wait(neverNotified, 0, 0, sleepMs)
    this.eventsAtLastPass = events
    setImmediate(this.endPass)
  }
}
