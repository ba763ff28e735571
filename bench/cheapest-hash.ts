import { closedLoop, requireStatus } from './load.js'
import { issueSignUps } from './request-bodies.js'
import type { Server, SystemUnderTest } from './system-under-test.js'

const seconds = 3

/** More sign-ups than any machine completes in one measurement. */
const signUps = 40_000

/** With these variables a hash takes 0.03 ms, so that everything else decides the rate of sign-ups. */
export const cheapestHash = { HASH_MEMORY_KIB: '8', HASH_PASSES: '1' }

/** Measures the sign-ups/s of a server whose hashes cost almost nothing. */
export async function measureSignUpRate({ stores: { redis } }: SystemUnderTest, server: Server): Promise<number> {
  const bodies = await issueSignUps(redis, signUps)
  const { perSecond, replies } = await closedLoop(server, { seconds, bodies })
  requireStatus(replies, 201, 'sign-ups')
  return perSecond
}
