import type { Redis } from 'ioredis'
import type { Reply } from './load.js'
import { openLoop } from './open-loop.js'
import { codeKey, issueSignUps, mobileOf } from './request-bodies.js'
import { percentile, round } from './statistics.js'
import type { Server } from './system-under-test.js'

/** The result of one offered load. The rates are per second. Without a refusal, the latencies of refusals are NaN. */
export interface LoadPoint {
  /** As a multiple of the capacity. */
  load: number
  offered: number
  goodput: number
  doneP50Ms: number
  doneP99Ms: number
  refusedP99Ms: number
}

/** Offers sign-ups to a server, `load` times the capacity. */
export async function offerLoad(server: Server, redis: Redis, capacity: number, load: number, seconds: number) {
  const perSecond = load * capacity
  const bodies = await issueSignUps(redis, Math.round(perSecond * seconds))
  const replies = await openLoop(server, perSecond, seconds, bodies)
  const failed = bodies.filter((_, index) => replies[index]?.status !== 201).map(mobileOf)
  const failedByStatus: Record<string, number> = {}
  for (const { status } of replies) if (status !== 201) failedByStatus[status] = (failedByStatus[status] ?? 0) + 1
  // The mobiles of those that failed, and what they were answered (0: no answer).
  return {
    point: loadPoint(load, perSecond, seconds, replies),
    done: bodies.length - failed.length,
    failed,
    failedByStatus
  }
}

/** Returns how many of these mobiles have a code that still works. */
export async function countCodes(redis: Redis, mobiles: readonly string[]): Promise<number> {
  const codes = await redis.pipeline(mobiles.map((mobile) => ['exists', codeKey(mobile)])).exec()
  return (codes ?? []).filter(([, exists]) => exists === 1).length
}

function loadPoint(load: number, perSecond: number, seconds: number, replies: readonly Reply[]): LoadPoint {
  const latenciesOf = (expected: number) => replies.filter(({ status }) => status === expected).map(({ ms }) => ms)
  const [done, refused] = [latenciesOf(201), latenciesOf(503)]
  // The sign-ups in the queue at the end are answered later, and that time counts.
  const lastAnswerSeconds = replies.reduce((last, { status, ms }, index) => {
    return status === 0 ? last : Math.max(last, index / perSecond + ms / 1_000)
  }, seconds)
  return {
    load,
    offered: round(perSecond),
    goodput: round(done.length / lastAnswerSeconds),
    doneP50Ms: round(percentile(done, 0.5)),
    doneP99Ms: round(percentile(done, 0.99)),
    refusedP99Ms: round(percentile(refused, 0.99))
  }
}
