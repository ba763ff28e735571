import { alternate } from './alternate.js'
import type { Lab, Subject } from './lab.js'
import { closedLoop, issueSignUps } from './load.js'
import type { Row } from './report.js'
import { median, round } from './statistics.js'

/** All but the hash costs next to nothing then. */
export const cheapestHash = { HASH_MEMORY_KIB: '8', HASH_PASSES: '1' }

/** Sign-ups a second of a subject whose hashes cost next to nothing. */
export async function signUpsPerSecond(lab: Lab, subject: Subject, seconds: number): Promise<number> {
  const bodies = await issueSignUps(lab.redis, 40_000)
  const { perSecond, replies } = await closedLoop(subject, { connections: 32, seconds, bodies })
  const failed = replies.filter(({ status }) => status !== 201).length
  if (failed > 0) throw new Error(`${failed} sign-ups failed`)
  return perSecond
}

/** P6: all but the hash, against a program without a framework that hashes nothing. */
export async function overhead(lab: Lab): Promise<Row[]> {
  const [rounds, seconds] = [6, 3]
  const service = await lab.service(cheapestHash)
  const bare = await lab.program('bare-server.ts')
  const pairs = await alternate(
    'overhead',
    rounds,
    () => signUpsPerSecond(lab, service, seconds),
    () => signUpsPerSecond(lab, bare, seconds)
  )
  await Promise.all([service.stop(), bare.stop()])
  return [
    {
      name: 'P6: sign-ups/s with the cheapest hash ÷ a bare program without one',
      figure: median(pairs.map(([ours, theirs]) => ours / theirs)),
      target: { atLeast: 0.75 },
      raw: pairs.map((pair) => pair.map(round))
    }
  ]
}
