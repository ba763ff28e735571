import { writeFileSync } from 'node:fs'
import { availableParallelism } from 'node:os'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Redis } from 'ioredis'
import { closedLoop, openLoop, type Reply, requireStatus, warmUp } from './load.js'
import { drawOverloadChart, type LoadPoint } from './overload-chart.js'
import { type Row, ratioRow, resultsFolder, showProgress } from './report.js'
import { codeKey, issueSignUps, mobileOf } from './request-bodies.js'
import { percentile, round } from './statistics.js'
import type { Server, SystemUnderTest } from './system-under-test.js'
import { bareHashes, defaultParameters } from './yardsticks/bare-hashes.js'

/** The loads of the chart, as multiples of the capacity. */
const chartLoads = [0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4]
const chartSeconds = 8

/** P5 and P7 are defined at this multiple of the capacity. */
const targetLoad = 3
const targetSeconds = 30
const targetRounds = 3

/** P5 and P7: goodput, refusals and memory above the capacity. Writes overload.svg, a chart from low load to overload. */
export async function overload(system: SystemUnderTest): Promise<Row[]> {
  const { redis } = system.stores
  const threads = availableParallelism()
  const service = await system.startService()
  await sleep(1_000)
  const idleMib = service.process.residentMib()
  await warmUp(service, redis)
  const { hashMs } = await bareHashes({ seconds: 3 })

  async function measureCapacity(): Promise<number> {
    const bodies = await issueSignUps(redis, 3_000 * threads)
    const { perSecond, replies } = await closedLoop(service, { seconds: 6, bodies })
    // Refusals are much faster than sign-ups, and would count as capacity.
    requireStatus(replies, 201, 'sign-ups')
    return perSecond
  }

  const chartCapacity = await measureCapacity()

  async function offer(load: number, seconds: number) {
    showProgress(`overload: ${load} × capacity (${round(chartCapacity)}/s), ${seconds} s`)
    const perSecond = load * chartCapacity
    const bodies = await issueSignUps(redis, Math.ceil(perSecond * seconds))
    const replies = await openLoop(service, { perSecond, seconds, bodies })
    return { bodies, replies, point: summarize(load, perSecond, seconds, replies) }
  }

  const points: LoadPoint[] = []
  for (const load of chartLoads) points.push((await offer(load, chartSeconds)).point)
  writeFileSync(new URL('overload.svg', resultsFolder), drawOverloadChart(points))

  const results = []
  let capacityBefore = await measureCapacity()
  for (let n = 0; n < targetRounds; n++) {
    const memory = watchMemory(service)
    const { bodies, replies, point } = await offer(targetLoad, targetSeconds)
    const peakMib = memory.stop()
    const refused = bodies.filter((_, index) => replies[index]?.status === 503)
    const capacityAfter = await measureCapacity()
    results.push({
      ...point,
      // The machine's speed drifts, so the capacity is measured just before and just after.
      capacity: (capacityBefore + capacityAfter) / 2,
      peakMib,
      kept: await countCodes(redis, refused.map(mobileOf)),
      refused: refused.length,
      neither201nor503: replies.filter(({ status }) => status !== 201 && status !== 503).length
    })
    capacityBefore = capacityAfter
  }
  return [
    ratioRow(
      'P5: sign-ups/s at 3 × capacity ÷ capacity',
      results.map(({ goodput, capacity }) => [goodput, capacity]),
      { atLeast: 0.95 }
    ),
    ratioRow(
      'P5: p99 of the refusals at 3 × capacity ÷ a bare hash',
      results.map(({ refusedP99Ms }) => [refusedP99Ms, hashMs]),
      { atMost: 3 }
    ),
    {
      name: 'P5: refused codes that are still in Redis, in parts of all',
      figure: Math.min(...results.map(({ kept, refused }) => kept / refused)),
      target: { atLeast: 1 },
      raw: results.map(({ kept, refused, neither201nor503 }) => ({ kept, refused, neither201nor503 }))
    },
    {
      name: 'P7: memory at 3 × capacity over idle and the hashes, MiB',
      figure:
        Math.max(...results.map(({ peakMib }) => peakMib)) - idleMib - (threads * defaultParameters.memoryKib) / 1_024,
      target: { atMost: 100 },
      raw: { peakMib: results.map(({ peakMib }) => round(peakMib)), idleMib: round(idleMib) }
    },
    {
      name: 'goodput at 4 × capacity ÷ capacity',
      figure: (points.at(-1)?.goodput ?? 0) / chartCapacity,
      raw: points
    }
  ]
}

function summarize(load: number, perSecond: number, seconds: number, replies: readonly Reply[]): LoadPoint {
  const latenciesOf = (expected: number) => replies.filter(({ status }) => status === expected).map(({ ms }) => ms)
  const [done, refused] = [latenciesOf(201), latenciesOf(503)]
  return {
    load,
    offered: round(perSecond),
    // The sign-ups in the queue at the end are answered up to HASH_MAX_WAIT_MS later, and that time counts.
    goodput: round(done.length / Math.max(seconds, lastReplySeconds(replies, seconds))),
    doneP50Ms: round(percentile(done, 0.5)),
    doneP99Ms: round(percentile(done, 0.99)),
    refusedP50Ms: round(percentile(refused, 0.5)),
    refusedP99Ms: round(percentile(refused, 0.99))
  }
}

/** Returns the time from the first request to the last reply. */
function lastReplySeconds(replies: readonly Reply[], seconds: number): number {
  const intervalSeconds = seconds / replies.length
  return replies.reduce((last, { ms }, index) => Math.max(last, index * intervalSeconds + ms / 1_000), 0)
}

async function countCodes(redis: Redis, mobiles: readonly string[]): Promise<number> {
  let count = 0
  for (const mobile of mobiles) count += await redis.exists(codeKey(mobile))
  return count
}

/** Samples the resident memory of a server until it is stopped. */
function watchMemory({ process }: Server) {
  let peakMib = 0
  const interval = setInterval(() => {
    peakMib = Math.max(peakMib, process.residentMib())
  }, 200)
  return {
    /** Returns the highest sample, in MiB. */
    stop(): number {
      clearInterval(interval)
      return peakMib
    }
  }
}
