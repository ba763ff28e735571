import type { FastifyBaseLogger } from 'fastify'
import type { StoreName } from '../telemetry/observer.js'

/**
 * A store cannot serve now: it does not answer, or answers that it cannot. The same request may succeed later. The store has
 * logged the cause.
 */
export class StoreUnavailable extends Error {
  override readonly name = 'StoreUnavailable'
  readonly code = 'STORE_UNAVAILABLE'
  /** For the client. Undefined means the default of the outcome. */
  retryAfterSeconds: number | undefined

  constructor(store: StoreName, cause?: unknown) {
    super(`${store} is unavailable`, { cause })
  }
}

/** Whether JavaScript or Node.js throws such an error for a wrong value. Neither a connection nor a timeout fails so. */
export const isProgrammingError = (error: Error): boolean =>
  [TypeError, RangeError, ReferenceError, SyntaxError].some((type) => error instanceof type)

/** Returns a function that logs a bug. It does not log an outage: the store has, and the log must not grow with the traffic then. */
export const bugLogger = (log: FastifyBaseLogger, message: string) => (err: unknown) => {
  if (!(err instanceof StoreUnavailable)) log.error({ err }, message)
}
