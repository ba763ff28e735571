import { BrokenCircuitError, CircuitState, ConsecutiveBreaker, circuitBreaker, handleWhen } from 'cockatiel'

export interface CircuitBreakerOptions {
  /** Failures in a row that open it. */
  failuresToOpen: number
  /** Which errors are failures of the other side. Any other error is an answer: it closes the breaker after a trial call. */
  isFailure(error: unknown): boolean
}

/** Refuses calls to something that keeps failing, instead of letting each of them wait for a timeout. */
export class CircuitBreaker {
  private readonly policy

  constructor({ failuresToOpen, isFailure }: CircuitBreakerOptions) {
    this.policy = circuitBreaker(handleWhen(isFailure), {
      breaker: new ConsecutiveBreaker(failuresToOpen),
      // Any call while it is open is a trial call: minus infinity is no pause, also if the clock is set back. 0 would be a
      // pause then.
      halfOpenAfter: Number.NEGATIVE_INFINITY
    })
  }

  /** True from the failure that has opened it until a trial call succeeds. */
  get isOpen(): boolean {
    return this.policy.state !== CircuitState.Closed
  }

  /** @throws {BrokenCircuitError} at once while it is open, or the error of the call */
  async execute<T>(call: () => Promise<T>): Promise<T> {
    // cockatiel would make this call wait for the result of the trial call.
    if (this.policy.state === CircuitState.HalfOpen) throw new BrokenCircuitError()
    return this.policy.execute(call)
  }
}
