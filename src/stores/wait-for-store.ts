import { setTimeout as sleep } from 'node:timers/promises'

/** How long a start waits for a store that does not answer. */
const timeoutMs = 10_000

const retryIntervalMs = 50

/**
 * Waits until a store answers: it may be starting at the same time as this service.
 *
 * @throws {Error} after 10 s, with the last failure as its cause
 */
export async function waitForStore(name: string, connect: () => Promise<unknown>): Promise<void> {
  const deadline = Date.now() + timeoutMs
  for (;;) {
    try {
      await connect()
      return
    } catch (cause) {
      if (Date.now() >= deadline) throw new Error(`${name} does not answer`, { cause })
      await sleep(retryIntervalMs)
    }
  }
}
