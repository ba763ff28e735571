import { setTimeout as sleep } from 'node:timers/promises'

/** How long a start waits for a store that does not answer. */
const timeoutMs = 10_000

/** The pause between two attempts. Each may take as long as STORE_TIMEOUT_MS. */
const pauseMs = 100

/**
 * Waits until a store answers: it may be starting at the same time as this service.
 *
 * @throws {Error} after 10 s, with the last failure as its cause
 */
export async function waitForStore(name: string, connect: () => Promise<unknown>): Promise<void> {
  const deadline = Date.now() + timeoutMs
  let failure: unknown = new Error('no answer')
  while (Date.now() < deadline) {
    failure = await Promise.race([
      connect().then(
        () => undefined,
        (error) => error
      ),
      sleep(deadline - Date.now(), failure, { ref: false })
    ])
    if (failure === undefined) return
    await sleep(pauseMs)
  }
  throw new Error(`${name} does not answer`, { cause: failure })
}
