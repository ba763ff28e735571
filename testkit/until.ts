import { setTimeout as sleep } from 'node:timers/promises'

/** Long enough for a machine that is busy with other work. */
const timeoutMs = 60_000

/** The first pause between two polls. It doubles up to the longest, so that a long wait takes little CPU time. */
const firstPauseMs = 2
const longestPauseMs = 50

/**
 * Polls until a condition holds.
 *
 * @param what completes the error "waited 60 s until …"
 */
export async function until(what: string, condition: () => boolean | Promise<boolean>): Promise<void> {
  // A race, because a condition may never settle.
  const timer = new AbortController()
  const timeout = sleep(timeoutMs, undefined, { signal: timer.signal }).then(() => {
    throw new Error(`waited ${timeoutMs / 1_000} s until ${what}`)
  })
  timeout.catch(() => undefined)
  try {
    let pauseMs = firstPauseMs
    while (!(await Promise.race([condition(), timeout]))) {
      await Promise.race([sleep(pauseMs), timeout])
      pauseMs = Math.min(2 * pauseMs, longestPauseMs)
    }
  } finally {
    timer.abort()
  }
}

/** Waits for the end of a promise. @returns whether it was fulfilled */
export const isFulfilled = (promise: Promise<unknown>) =>
  promise.then(
    () => true,
    () => false
  )

/** Returns whether the readiness probe of a service succeeds. */
export const isReady = (url: string) =>
  fetch(`${url}/health/ready`).then(
    ({ ok }) => ok,
    () => false
  )

/** Repeats a request while it is answered 503, and returns the first other reply. */
export async function retried<Reply extends { statusCode: number }>(send: () => Promise<Reply>): Promise<Reply> {
  let reply = await send()
  if (reply.statusCode !== 503) return reply
  await until('a retry is not answered 503', async () => {
    reply = await send()
    return reply.statusCode !== 503
  })
  return reply
}
