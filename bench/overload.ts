import { writeFileSync } from 'node:fs'
import { availableParallelism } from 'node:os'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Redis } from 'ioredis'
import { bareHashes, defaultParameters } from './bare-hashes.js'
import { closedLoop, openLoop, type Reply, requireStatus, warmUp } from './load.js'
import { drawOverloadChart, type LoadPoint } from './overload-chart.js'
import { type Row, ratioRow, resultsFolder, showProgress } from './report.js'
import { codeKey, issueSignUps, mobileOf } from './request-bodies.js'
import { percentile, round } from './statistics.js'
import type { Server, SystemUnderTest } from './system-under-test.js'

/** The loads of the chart, as multiples of the capacity of the service. */
const chartLoads = [0.25, 0.5, 0.75, 1, 1.5, 2, 3]
const chartSeconds = 6

/** P5 and P7 are defined at this multiple of the capacity. */
const targetLoad = 3
const targetSeconds = 30

/**
 * P5 and P7: goodput, refusals and memory above the capacity, and beside it what the plain handler does. Writes overload.svg, a chart
 * of both from low load to overload.
 */
export async function overload(system: SystemUnderTest): Promise<Row[]> {
  const { redis } = system.stores
  const threads = availableParallelism()
  const service = await system.startService()
  await sleep(1_000)
  const idleMib = service.process.residentMib()
  const plainHandler = await system.startPlainHandler()
  for (const server of [service, plainHandler]) await warmUp(server, redis)
  const { hashMs } = await bareHashes({ seconds: 3 })

  async function measureCapacity(): Promise<number> {
    const bodies = await issueSignUps(redis, 3_600 * threads)
    const { perSecond, replies } = await closedLoop(service, { seconds: 6, bodies })
    // Refusals are much faster than sign-ups, and would count as capacity.
    requireStatus(replies, 201, 'sign-ups')
    return perSecond
  }

  const chartCapacity = await measureCapacity()

  async function offer(server: Server, load: number, seconds: number) {
    const perSecond = load * chartCapacity
    const bodies = await issueSignUps(redis, Math.ceil(perSecond * seconds))
    const replies = await openLoop(server, { perSecond, seconds, bodies })
    return { bodies, replies, point: summarize(load, perSecond, seconds, replies) }
  }

  const [points, plainPoints]: [LoadPoint[], LoadPoint[]] = [[], []]
  for (const load of chartLoads) {
    showProgress(`overload: ${load} × capacity (${round(chartCapacity)}/s)`)
    points.push((await offer(service, load, chartSeconds)).point)
    plainPoints.push((await offer(plainHandler, load, chartSeconds)).point)
  }
  writeFileSync(new URL('overload.svg', resultsFolder), drawOverloadChart(points, plainPoints))

  /** What becomes of the codes of those who were not signed up. */
  async function countKept({ bodies, replies }: { bodies: string[]; replies: Reply[] }) {
    const failed = bodies.filter((_, index) => replies[index]?.status !== 201)
    return { failed: failed.length, kept: await countCodes(redis, failed.map(mobileOf)) }
  }

  showProgress(`overload: ${targetLoad} × capacity, ${targetSeconds} s`)
  // The machine's speed drifts, so the capacity is measured just before and just after.
  const capacityBefore = await measureCapacity()
  const memory = watchMemory(service)
  const offered = await offer(service, targetLoad, targetSeconds)
  const peakMib = memory.stop()
  const capacity = (capacityBefore + (await measureCapacity())) / 2
  const { failed, kept } = await countKept(offered)
  showProgress('overload: the plain handler')
  const plain = await offer(plainHandler, targetLoad, targetSeconds)
  const plainKept = await countKept(plain)
  return [
    ratioRow('P5: sign-ups/s at 3 × capacity ÷ capacity', [[offered.point.goodput, capacity]], { atLeast: 0.95 }),
    ratioRow('P5: p99 of the refusals at 3 × capacity ÷ a bare hash', [[offered.point.refusedP99Ms, hashMs]], {
      atMost: 2
    }),
    {
      name: 'P5: codes of refused sign-ups that still work, in parts of all',
      figure: kept / failed,
      target: { atLeast: 1 },
      raw: { kept, failed }
    },
    {
      name: 'P7: memory at 3 × capacity over idle and the hashes, MiB',
      figure: peakMib - idleMib - (threads * defaultParameters.memoryKib) / 1_024,
      target: { atMost: 100 },
      raw: { peakMib: round(peakMib), idleMib: round(idleMib) }
    },
    ratioRow('plain handler: sign-ups/s at 3 × capacity ÷ capacity', [[plain.point.goodput, capacity]]),
    {
      name: 'plain handler: codes of failed sign-ups that still work, in parts of all',
      figure: plainKept.kept / plainKept.failed,
      raw: plainKept
    },
    {
      name: 'plain handler: p50 of its sign-ups at 3 × capacity, ms',
      figure: plain.point.doneP50Ms,
      raw: { points, plainPoints }
    }
  ]
}

function summarize(load: number, perSecond: number, seconds: number, replies: readonly Reply[]): LoadPoint {
  const latenciesOf = (expected: number) => replies.filter(({ status }) => status === expected).map(({ ms }) => ms)
  const [done, refused] = [latenciesOf(201), latenciesOf(503)]
  return {
    load,
    offered: round(perSecond),
    // The sign-ups in the queue at the end are answered later, and that time counts.
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
