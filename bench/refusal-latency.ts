import { availableParallelism } from 'node:os'
import { alternate } from './alternate.js'
import { bareHashes } from './bare-hashes.js'
import { closedLoop, requireStatus, warmUp } from './load.js'
import { openLoop } from './open-loop.js'
import { type Row, ratioRow } from './report.js'
import { issueSignUps, newMobiles, signUpBody } from './request-bodies.js'
import { percentile } from './statistics.js'
import type { SystemUnderTest } from './system-under-test.js'

const seconds = 6
const wrongCodesPerSecond = 300

/** One address sends all wrong codes. */
const wideLimits = {
  SMS_CODE_ATTEMPTS: '1000',
  SMS_GUESS_DAILY_MAX: '0',
  SMS_GUESS_IP_HOURLY_MAX: '1000000',
  SMS_GUESS_HOURLY_MAX: '1000000'
}

/** P3: the latency of wrong codes while sign-ups saturate the hash threads. A refusal never waits for a hash. */
export async function refusalLatency(system: SystemUnderTest): Promise<Row[]> {
  const { redis } = system.stores
  const service = await system.startService(wideLimits)
  await warmUp(service, redis)
  const wrongCodes = newMobiles(1_000).map((mobile) => signUpBody(mobile))

  async function measureWrongCodes(): Promise<number> {
    const bodies = await issueSignUps(redis, 500 * availableParallelism() * seconds)
    const [, refusals] = await Promise.all([
      closedLoop(service, { seconds, bodies }),
      openLoop(service, wrongCodesPerSecond, seconds, wrongCodes)
    ])
    requireStatus(refusals, 422, 'wrong codes')
    return percentile(
      refusals.map(({ ms }) => ms),
      0.99
    )
  }

  const rounds = await alternate('priority', 5, measureWrongCodes, () => bareHashes(3))
  return [
    ratioRow(
      `P3: p99 of wrong codes, ${wrongCodesPerSecond}/s, under saturation ÷ a bare hash`,
      rounds.map(([p99Ms, { hashMs }]) => [p99Ms, hashMs]),
      { atMost: 1.5 }
    )
  ]
}
