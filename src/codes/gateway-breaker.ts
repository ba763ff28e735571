/** The window in which results count. */
const windowMs = 10_000

/** How long the gateway gets no messages. Then it gets all again: a single trial could be a number that always fails. */
const pauseMs = 5_000

/** So many mobiles must have failed, so that one mobile can neither open the breaker nor keep it open. */
const mobilesToOpen = 5

/**
 * Stops the messages to a gateway that fails: when within ten seconds at least five mobiles, and at least half of all, have
 * failed. Each mobile counts once, with its last result.
 */
export class GatewayBreaker {
  /** The last result of each mobile in the window. */
  private readonly results = new Map<string, { hasFailed: boolean; at: number }>()
  private pausedUntil = 0

  /** 0, or the milliseconds until the gateway gets messages again. */
  get remainingPauseMs(): number {
    return Math.max(0, this.pausedUntil - performance.now())
  }

  /** @returns whether this result has opened the breaker */
  record(mobile: string, hasFailed: boolean): boolean {
    // Messages that were sent before the pause say nothing about the time after it.
    if (this.remainingPauseMs > 0) return false
    const now = performance.now()
    this.results.set(mobile, { hasFailed, at: now })
    for (const [other, { at }] of this.results) if (now - at >= windowMs) this.results.delete(other)
    const failedCount = [...this.results.values()].filter((result) => result.hasFailed).length
    if (failedCount < mobilesToOpen || 2 * failedCount < this.results.size) return false
    this.pausedUntil = now + pauseMs
    this.results.clear()
    return true
  }
}
