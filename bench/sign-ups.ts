import { availableParallelism } from 'node:os'
import { alternate } from './alternate.js'
import { bareHashes } from './bare-hashes.js'
import { closedLoop, requireStatus, warmUp } from './load.js'
import { medianRow, type Row, ratioRow } from './report.js'
import { issueSignUps } from './request-bodies.js'
import { median, percentile } from './statistics.js'
import type { Server, SystemUnderTest } from './system-under-test.js'

const seconds = 4

/** More sign-ups than any machine completes in one round. */
const signUpsPerRound = 600 * availableParallelism() * seconds

/** P1, P2, P4 and P6: the service beside the plain handler. */
export async function signUps(system: SystemUnderTest, { isShort }: { isShort: boolean }): Promise<Row[]> {
  const { redis } = system.stores
  // On a machine that is busy with other work, nobody is refused: only sign-ups are compared.
  const service = await system.startService({ HASH_MAX_WAIT_MS: '20000', STORE_TIMEOUT_MS: '20000' })
  const plainHandler = await system.startPlainHandler()
  // A service runs for weeks. After 5 s V8 has not optimized half of the code that runs, and the service has more of it.
  for (const server of [service, plainHandler]) await warmUp(server, redis, isShort ? 5 : 40)

  async function measure(server: Server) {
    const bodies = await issueSignUps(redis, signUpsPerRound)
    const { replies, ...result } = await closedLoop(server, { seconds, bodies })
    requireStatus(replies, 201, 'sign-ups')
    const latencies = replies.map(({ ms }) => ms)
    return { ...result, p50Ms: median(latencies), p99Ms: percentile(latencies, 0.99) }
  }
  const measureService = () => measure(service)

  const rounds = await alternate('limit: the service, the plain handler', isShort ? 3 : 9, measureService, () =>
    measure(plainHandler)
  )
  const hashRounds = await alternate('limit: the service, bare hashes', isShort ? 1 : 2, measureService, () =>
    bareHashes(seconds)
  )
  const ratio = (name: string, key: 'perSecond' | 'cpuMs' | 'eventLoopMs', target: Row['target']) =>
    ratioRow(
      name,
      rounds.map(([ours, plain]) => [ours[key], plain[key]]),
      target
    )
  return [
    ratio('P1: sign-ups/s ÷ those of the plain handler, 32 connections', 'perSecond', { atLeast: 0.97 }),
    ratio('P2: CPU of a sign-up ÷ that of the plain handler', 'cpuMs', { atMost: 1 }),
    ratioRow(
      'P4: p99 ÷ p50 of sign-ups, 32 connections',
      rounds.map(([{ p99Ms, p50Ms }]) => [p99Ms, p50Ms]),
      { atMost: 1.3 }
    ),
    ratioRow(
      'plain handler: p99 ÷ p50 of sign-ups',
      rounds.map(([, { p99Ms, p50Ms }]) => [p99Ms, p50Ms])
    ),
    ratio('P6: event-loop time of a sign-up ÷ that of the plain handler', 'eventLoopMs', { atMost: 1.1 }),
    medianRow(
      'sign-ups/s',
      rounds.map(([{ perSecond }]) => perSecond)
    ),
    ratioRow(
      'sign-ups/s ÷ bare hashes/s',
      hashRounds.map(([ours, bare]) => [ours.perSecond, bare.perSecond])
    )
  ]
}
