import { writeFileSync } from 'node:fs'
import { availableParallelism } from 'node:os'
import { setTimeout as sleep } from 'node:timers/promises'
import { bareHashes } from './bare-hashes.js'
import { drawOverload, type LoadPoint } from './drawing.js'
import type { Lab, Subject } from './lab.js'
import { closedLoop, issueSignUps, mobileOf, openLoop, type Reply } from './load.js'
import { progress, type Row, resultsFolder } from './report.js'
import { median, percentile, round } from './statistics.js'

const loads = [0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4]

/** The runs at 3 × capacity, which the targets speak of. */
const rounds = 3
const roundSeconds = 30

/** P5 and P7, and the curve that stays flat past capacity. */
export async function overload(lab: Lab): Promise<Row[]> {
  const threads = availableParallelism()
  const service = await lab.service()
  await sleep(1_000)
  const idleMib = service.residentMib()
  await closedLoop(service, { connections: 32, seconds: 2, bodies: await issueSignUps(lab.redis, 2_000) })
  const { perSecond: hashesPerSecond } = await bareHashes({ threads, seconds: 3 })
  const hashMs = (1_000 * threads) / hashesPerSecond
  const measureCapacity = async () =>
    (await closedLoop(service, { connections: 32, seconds: 6, bodies: await issueSignUps(lab.redis, 3_000 * threads) }))
      .perSecond
  const capacity = await measureCapacity()

  async function offer(load: number, seconds: number) {
    progress(`overload: ${load} × capacity (${round(capacity)}/s), ${seconds} s`)
    const bodies = await issueSignUps(lab.redis, Math.ceil(load * capacity * seconds))
    const replies = await openLoop(service, { perSecond: load * capacity, seconds, bodies })
    return { bodies, replies, point: describe(load, seconds, capacity, replies) }
  }

  const points: LoadPoint[] = []
  for (const load of loads) points.push((await offer(load, 8)).point)

  const results = []
  let capacityBefore = await measureCapacity()
  for (let n = 0; n < rounds; n++) {
    const memory = watchMemory(service)
    const { bodies, replies, point } = await offer(3, roundSeconds)
    const peakMib = memory.stop()
    const refused = bodies.filter((_, k) => replies[k]?.status === 503)
    // The machine's speed drifts: the capacity just before and just after.
    const capacityAfter = await measureCapacity()
    results.push({
      ...point,
      capacity: (capacityBefore + capacityAfter) / 2,
      peakMib,
      kept: await countCodes(lab, refused),
      refused: refused.length,
      neither201nor503: replies.filter(({ status }) => status !== 201 && status !== 503).length
    })
    capacityBefore = capacityAfter
  }
  await service.stop()
  writeFileSync(new URL('overload.svg', resultsFolder), drawOverload(points))
  return [
    {
      name: 'P5: sign-ups/s at 3 × capacity ÷ capacity',
      figure: median(results.map((result) => result.goodput / result.capacity)),
      target: { atLeast: 0.9 },
      raw: results.map((result) => [result.goodput, round(result.capacity)])
    },
    {
      name: 'P5: p99 of the refusals at 3 × capacity ÷ a bare hash',
      figure: median(results.map(({ refusedP99Ms }) => refusedP99Ms / hashMs)),
      target: { atMost: 4 },
      raw: { refusedP99Ms: results.map(({ refusedP99Ms }) => refusedP99Ms), hashMs: round(hashMs) }
    },
    {
      name: 'P5: refused codes that are still in Redis, in parts of all',
      figure: Math.min(...results.map(({ kept, refused }) => kept / refused)),
      target: { atLeast: 1 },
      raw: results.map(({ kept, refused, neither201nor503 }) => ({ kept, refused, neither201nor503 }))
    },
    {
      name: 'P7: memory at 3 × capacity over idle and the hashes, MiB',
      figure: Math.max(...results.map(({ peakMib }) => peakMib)) - idleMib - (threads * 19_456) / 1_024,
      target: { atMost: 100 },
      raw: { peakMib: results.map(({ peakMib }) => round(peakMib)), idleMib: round(idleMib) }
    },
    {
      name: 'goodput at 4 × capacity ÷ capacity',
      figure: (points.at(-1)?.goodput ?? 0) / capacity,
      raw: points
    }
  ]
}

function describe(load: number, seconds: number, capacity: number, replies: readonly Reply[]): LoadPoint {
  const done = replies.filter(({ status }) => status === 201).map(({ ms }) => ms)
  const refused = replies.filter(({ status }) => status === 503).map(({ ms }) => ms)
  return {
    load,
    offered: round(load * capacity),
    // What the queue holds at the end is answered after it, in at most HASH_MAX_WAIT_MS more.
    goodput: round(done.length / Math.max(seconds, lastAnswerSeconds(replies, seconds))),
    doneP50Ms: round(percentile(done, 0.5)),
    doneP99Ms: round(percentile(done, 0.99)),
    refusedP50Ms: round(percentile(refused, 0.5)),
    refusedP99Ms: round(percentile(refused, 0.99))
  }
}

/** When the last request was answered, in seconds after the first was sent. */
function lastAnswerSeconds(replies: readonly Reply[], seconds: number): number {
  const spacing = seconds / replies.length
  return replies.reduce((last, { ms }, n) => Math.max(last, n * spacing + ms / 1_000), 0)
}

async function countCodes(lab: Lab, bodies: readonly string[]): Promise<number> {
  let kept = 0
  for (const body of bodies) kept += await lab.redis.exists(`sms_code_${mobileOf(body)}`)
  return kept
}

/** Samples the resident memory of a process. */
function watchMemory(subject: Subject) {
  let peakMib = 0
  const interval = setInterval(() => {
    peakMib = Math.max(peakMib, subject.residentMib())
  }, 200)
  return {
    stop() {
      clearInterval(interval)
      return peakMib
    }
  }
}
