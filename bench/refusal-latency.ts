import { availableParallelism } from 'node:os'
import { alternate } from './alternate.js'
import { bareHashes } from './bare-hashes.js'
import { closedLoop, openLoop, requireStatus, warmUp } from './load.js'
import { medianRow, type Row } from './report.js'
import { issueSignUps, unissuedSignUps } from './request-bodies.js'
import { percentile, round } from './statistics.js'
import type { SystemUnderTest } from './system-under-test.js'

const rounds = 5
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
  const wrongCodes = unissuedSignUps(1_000)

  async function measureWrongCodes() {
    const bodies = await issueSignUps(redis, 500 * availableParallelism() * seconds)
    const [signUps, refusals] = await Promise.all([
      closedLoop(service, { seconds, bodies }),
      openLoop(service, { perSecond: wrongCodesPerSecond, seconds, bodies: wrongCodes })
    ])
    requireStatus(refusals, 422, 'wrong codes')
    const latencies = refusals.map(({ ms }) => ms)
    return { p99Ms: percentile(latencies, 0.99), signUpsPerSecond: signUps.perSecond }
  }

  const results = await alternate(rounds, () => bareHashes({ seconds: 3 }), measureWrongCodes, 'priority')
  return [
    medianRow(
      `P3: p99 of wrong codes, ${wrongCodesPerSecond}/s, under saturation ÷ a bare hash`,
      results.map(([{ hashMs }, { p99Ms }]) => p99Ms / hashMs),
      { atMost: 1.5 },
      results.map(([{ hashMs }, { p99Ms, signUpsPerSecond }]) => [p99Ms, hashMs, signUpsPerSecond].map(round))
    )
  ]
}
