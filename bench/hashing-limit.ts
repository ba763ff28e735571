import { availableParallelism } from 'node:os'
import { alternate } from './alternate.js'
import { closedLoop, requireStatus, saturatingConnections, warmUp } from './load.js'
import { medianRow, type Row, ratioRow } from './report.js'
import { issueSignUps } from './request-bodies.js'
import { median, percentile } from './statistics.js'
import type { SystemUnderTest } from './system-under-test.js'
import { bareHashes } from './yardsticks/bare-hashes.js'

const seconds = 3

/** More sign-ups than any machine completes in one round. */
const signUpsPerRound = 500 * availableParallelism() * seconds

/** P1, P2, P4 and P6: sign-ups compared with nothing but their hashes. */
export async function hashingLimit(system: SystemUnderTest, { isShort }: { isShort: boolean }): Promise<Row[]> {
  const { redis } = system.stores
  const service = await system.startService()
  await warmUp(service, redis)

  async function measureSignUps(connections: number) {
    const bodies = await issueSignUps(redis, signUpsPerRound)
    const signUps = await closedLoop(service, { connections, seconds, bodies })
    requireStatus(signUps.replies, 201, 'sign-ups')
    const latencies = signUps.replies.map(({ ms }) => ms)
    return { ...signUps, p50Ms: median(latencies), p99Ms: percentile(latencies, 0.99) }
  }

  const rows: Row[] = []
  for (const connections of isShort ? [saturatingConnections] : [1, 2, 8, saturatingConnections, 128]) {
    const hasTargets = connections === saturatingConnections
    // Figures with a target need more rounds, because the machine's speed drifts by more than their margins.
    const rounds = hasTargets && !isShort ? 15 : 3
    const results = await alternate(
      rounds,
      () => bareHashes({ seconds }),
      () => measureSignUps(connections),
      `limit: ${connections} connections`
    )
    rows.push(
      ratioRow(
        `${hasTargets ? 'P1: ' : ''}sign-ups/s ÷ bare hashes/s, ${connections} connections`,
        results.map(([bare, signUps]) => [signUps.perSecond, bare.perSecond]),
        hasTargets ? { atLeast: 0.95 } : undefined
      )
    )
    if (!hasTargets) continue
    rows.push(
      ratioRow(
        'P2: CPU of a sign-up in the service ÷ CPU of a bare hash',
        results.map(([bare, signUps]) => [signUps.cpuMs, bare.cpuMs]),
        { atMost: 1.08 }
      ),
      ratioRow(
        `P4: p99 ÷ p50 of sign-ups, ${connections} connections`,
        results.map(([, { p99Ms, p50Ms }]) => [p99Ms, p50Ms]),
        { atMost: 1.3 }
      ),
      medianRow(
        'P6: event-loop time of a sign-up, ms',
        results.map(([, { eventLoopMs }]) => eventLoopMs),
        { atMost: 0.8 }
      )
    )
  }
  return rows
}
