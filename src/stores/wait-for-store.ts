import { setTimeout as sleep } from 'node:timers/promises'

/** How long a start waits for a store that does not answer. */
const timeoutMs = 10_000

/** The first pause between two attempts. It doubles up to the longest, so that a store in trouble is not flooded. */
const firstPauseMs = 50
const longestPauseMs = 800

/**
 * Waits until a store answers: it may be starting at the same time as this service.
 *
 * @throws {Error} after 10 s, with the last failure as its cause
 */
export async function waitForStore(name: string, connect: () => Promise<unknown>): Promise<void> {
  const deadline = Date.now() + timeoutMs
  let failure: unknown = new Error('no answer')
  for (let pauseMs = firstPauseMs; ; pauseMs = Math.min(2 * pauseMs, longestPauseMs)) {
    const remainingMs = deadline - Date.now()
    if (remainingMs <= 0) throw new Error(`${name} does not answer`, { cause: failure })
    // An attempt may take as long as STORE_TIMEOUT_MS.
    failure = await Promise.race([
      connect().then(
        () => undefined,
        (error) => error
      ),
      sleep(remainingMs, failure, { ref: false })
    ])
    if (failure === undefined) return
    await sleep(pauseMs)
  }
}
