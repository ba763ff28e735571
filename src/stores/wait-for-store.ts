import { setTimeout as sleep } from 'node:timers/promises'

/** How long a start waits for a store that does not answer. */
const waitMs = 10_000

/**
 * Waits until a store answers, as it may be starting beside this service.
 *
 * @throws {Error} with the last failure as its cause
 */
export async function waitForStore(name: string, attempt: () => Promise<unknown>): Promise<void> {
  const deadline = Date.now() + waitMs
  for (;;) {
    try {
      await attempt()
      return
    } catch (cause) {
      if (Date.now() >= deadline) throw new Error(`${name} does not answer`, { cause })
      await sleep(50)
    }
  }
}
