/** Promises that somebody waits for before an end, whoever else does. */
export class Unsettled {
  private readonly promises = new Set<Promise<unknown>>()

  /** @returns the promise */
  add<T>(promise: Promise<T>): Promise<T> {
    this.promises.add(promise)
    const settled = () => this.promises.delete(promise)
    promise.then(settled, settled)
    return promise
  }

  /** Resolves when there is none left, those included that come meanwhile. Their failures are not its own. */
  async none(): Promise<void> {
    while (this.promises.size > 0) await Promise.allSettled(this.promises)
  }
}
