export type StoreName = 'postgres' | 'redis'

/** How many events of users wait, how old the oldest of them is, and how many are given up. */
export interface EventBacklog {
  waiting: number
  oldestSeconds: number
  undeliverable: number
}

/** Receives the events of the stores, the hash queue, the codes and the limits. */
export interface Observer {
  /** A round trip to a store has ended, successfully or not. */
  onRoundTrip(store: StoreName, durationMs: number, hasFailed: boolean): void
  /** A hash or a verification has ended. `waitMs` is its time in the queue, `durationMs` that in libuv's pool. */
  onHash(waitMs: number, durationMs: number): void
  /** The SMS gateway has accepted a code, or may have. */
  onCodeSent(): void
  /** A code that this service had sent has completed a request. */
  onCodeUsed(): void
  /** A limit has refused a request. */
  onLimitReached(limit: string): void
}

/** Reports a round trip to an observer, if there is one. @returns the round trip */
export function observeRoundTrip<T>(observer: Observer | undefined, store: StoreName, trip: Promise<T>): Promise<T> {
  if (observer === undefined) return trip
  const startedAt = performance.now()
  const report = (hasFailed: boolean) => observer.onRoundTrip(store, performance.now() - startedAt, hasFailed)
  trip.then(
    () => report(false),
    () => report(true)
  )
  return trip
}
