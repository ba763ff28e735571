import { writeFileSync } from 'node:fs'
import { availableParallelism } from 'node:os'
import { setTimeout as sleep } from 'node:timers/promises'
import { bareHashes, defaultParameters } from './bare-hashes.js'
import { closedLoop, requireStatus, warmUp } from './load.js'
import { countCodes, type LoadPoint, offerLoad } from './offered-load.js'
import { patienceMs } from './open-loop.js'
import { drawOverloadChart } from './overload-chart.js'
import { residentMib } from './process-usage.js'
import { type Row, ratioRow, resultsFolder, showProgress } from './report.js'
import { issueSignUps } from './request-bodies.js'
import { round } from './statistics.js'
import type { Server, SystemUnderTest } from './system-under-test.js'

/** The loads of the chart, as multiples of the capacity of the service. */
const chartLoads = [0.5, 0.75, 1, 1.5, 2, 3]
const chartSeconds = 5

/** P5 and P7 are defined at this multiple of the capacity. */
const targetLoad = 3
const targetSeconds = 30

/**
 * P5 and P7: goodput, refusals and memory above the capacity, and beside it what happens to the users of the plain handler. Writes
 * overload.svg, a chart of both from low load to overload.
 */
export async function overload(system: SystemUnderTest): Promise<Row[]> {
  const { redis } = system.stores
  const threads = availableParallelism()
  const service = await system.startService()
  await sleep(1_000)
  const idleMib = residentMib(service.process)
  const plainHandler = await system.startPlainHandler()
  for (const server of [service, plainHandler]) await warmUp(server, redis)
  const { hashMs } = await bareHashes(3)

  async function measureCapacity(): Promise<number> {
    const bodies = await issueSignUps(redis, 3_600 * threads)
    const { perSecond, replies } = await closedLoop(service, { seconds: 6, bodies })
    // Refusals are much faster than sign-ups, and would count as capacity.
    requireStatus(replies, 201, 'sign-ups')
    return perSecond
  }
  const chartCapacity = await measureCapacity()

  const offer = (server: Server, load: number, seconds: number) =>
    offerLoad(server, redis, chartCapacity, load, seconds)

  const [points, plainPoints]: [LoadPoint[], LoadPoint[]] = [[], []]
  for (const load of chartLoads) {
    showProgress(`overload: ${load} × capacity (${round(chartCapacity)}/s)`)
    points.push((await offer(service, load, chartSeconds)).point)
    plainPoints.push((await offer(plainHandler, load, chartSeconds)).point)
  }
  writeFileSync(new URL('overload.svg', resultsFolder), drawOverloadChart(points, plainPoints))

  showProgress(`overload: ${targetLoad} × capacity, ${targetSeconds} s`)
  // The machine's speed drifts, so the capacity is measured just before and just after.
  const capacityBefore = await measureCapacity()
  let peakMib = 0
  const watch = setInterval(() => {
    peakMib = Math.max(peakMib, residentMib(service.process))
  }, 200)
  const ours = await offer(service, targetLoad, targetSeconds)
  clearInterval(watch)
  const capacity = (capacityBefore + (await measureCapacity())) / 2

  showProgress(`overload: the plain handler at ${targetLoad} × capacity, ${targetSeconds} s`)
  // Its pool closes connections that are idle for 10 s. A new one logs in with PBKDF2 in libuv's pool, behind all queued hashes: after
  // an idle time no INSERT gets a connection before all clients have given up. So this measures a handler that is in use.
  await warmUp(plainHandler, redis)
  const plain = await offer(plainHandler, targetLoad, targetSeconds)

  const hashesMib = (threads * defaultParameters.memoryKib) / 1_024
  const [kept, plainKept] = [await countCodes(redis, ours.failed), await countCodes(redis, plain.failed)]
  return [
    ratioRow('P5: sign-ups/s at 3 × capacity ÷ capacity', [[ours.point.goodput, capacity]], { atLeast: 0.95 }),
    ratioRow('P5: p99 of the refusals ÷ a bare hash', [[ours.point.refusedP99Ms, hashMs]], { atMost: 2 }),
    {
      name: 'P5: codes of refused sign-ups that still work, in parts of all',
      figure: kept / ours.failed.length,
      target: { atLeast: 1 },
      raw: { done: ours.done, failedByStatus: ours.failedByStatus, kept }
    },
    {
      name: 'P7: memory at 3 × capacity over idle and the hashes, MiB',
      figure: peakMib - idleMib - hashesMib,
      target: { atMost: 100 },
      raw: { peakMib: round(peakMib), idleMib: round(idleMib) }
    },
    ratioRow('plain handler: sign-ups/s at 3 × capacity ÷ capacity', [[plain.point.goodput, capacity]]),
    {
      name: `plain handler: clients without an answer after ${patienceMs / 1_000} s, in parts of all`,
      figure: (plain.failedByStatus[0] ?? 0) / (plain.done + plain.failed.length),
      raw: { done: plain.done, failedByStatus: plain.failedByStatus, kept: plainKept }
    },
    {
      name: 'plain handler: codes of failed sign-ups that still work, in parts of all',
      figure: plainKept / plain.failed.length,
      raw: { points, plainPoints }
    }
  ]
}
