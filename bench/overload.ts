import { writeFileSync } from 'node:fs'
import { availableParallelism } from 'node:os'
import { setTimeout as sleep } from 'node:timers/promises'
import { bareHashes } from './bare-hashes.js'
import { drawOverload, type LoadPoint } from './drawing.js'
import type { Lab, Subject } from './lab.js'
import { closedLoop, issueSignUps, openLoop, type Reply } from './load.js'
import { progress, type Row, resultsFolder } from './report.js'
import { percentile, round } from './statistics.js'

const loads = [0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4]

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

  const points: LoadPoint[] = []
  const rows: Row[] = []
  for (const load of loads) {
    const seconds = load === 3 ? 30 : 8
    progress(`overload: ${load} × capacity (${round(capacity)}/s), ${seconds} s`)
    const bodies = await issueSignUps(lab.redis, Math.ceil(load * capacity * seconds))
    const capacityBefore = load === 3 ? await measureCapacity() : capacity
    const memory = watchMemory(service)
    const replies = await openLoop(service, { perSecond: load * capacity, seconds, bodies })
    const peakMib = memory.stop()
    const point = describe(load, seconds, capacity, replies)
    points.push(point)
    if (load !== 3) continue

    // The machine's speed drifts: the capacity just before and just after.
    const capacityAfter = await measureCapacity()

    const refused = replies
      .map(({ status }, n) => (status === 503 ? bodies[n] : undefined))
      .filter((body) => body !== undefined)
    const kept = await countCodes(lab, refused)
    const failed = replies.filter(({ status }) => status !== 201 && status !== 503).length
    rows.push(
      {
        name: 'P5: sign-ups/s at 3 × capacity ÷ capacity',
        figure: (2 * point.goodput) / (capacityBefore + capacityAfter),
        target: { atLeast: 0.9 },
        raw: [round(point.goodput), round(capacityBefore), round(capacityAfter)]
      },
      {
        name: 'P5: p99 of the refusals at 3 × capacity ÷ a bare hash',
        figure: point.refusedP99Ms / hashMs,
        target: { atMost: 4 },
        raw: [round(point.refusedP99Ms), round(hashMs)]
      },
      {
        name: 'P5: refused codes that are still in Redis, in parts of all',
        figure: refused.length === 0 ? Number.NaN : kept / refused.length,
        target: { atLeast: 1 },
        raw: [kept, refused.length, { neither201nor503: failed }]
      },
      {
        name: 'P7: memory at 3 × capacity over idle and the hashes, MiB',
        figure: peakMib - idleMib - (threads * 19_456) / 1_024,
        target: { atMost: 100 },
        raw: [round(peakMib), round(idleMib)]
      }
    )
  }
  await service.stop()
  writeFileSync(new URL('overload.svg', resultsFolder), drawOverload(points))
  rows.push({
    name: 'goodput at 4 × capacity ÷ capacity',
    figure: (points.at(-1)?.goodput ?? 0) / capacity,
    raw: points
  })
  return rows
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
  for (const body of bodies) kept += await lab.redis.exists(`sms_code_${JSON.parse(body).mobile}`)
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
