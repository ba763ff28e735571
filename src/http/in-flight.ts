/** Promises that must settle before something may be closed. */
export class InFlight {
  private readonly promises = new Set<Promise<unknown>>()

  /** @returns the promise */
  track<T>(promise: Promise<T>): Promise<T> {
    this.promises.add(promise)
    const remove = () => this.promises.delete(promise)
    promise.then(remove, remove)
    return promise
  }

  /** Resolves when all promises have settled, including those that are added meanwhile. Never rejects. */
  async drain(): Promise<void> {
    while (this.promises.size > 0) await Promise.allSettled(this.promises)
  }
}
