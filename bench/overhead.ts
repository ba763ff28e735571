import type { Lab } from './lab.js'
import { closedLoop, issueSignUps } from './load.js'
import { progress, type Row } from './report.js'
import { median, round } from './statistics.js'

/** P6: all but the hash, against a program without a framework that hashes nothing. */
export async function overhead(lab: Lab): Promise<Row[]> {
  const [rounds, seconds] = [6, 3]
  const service = await lab.service({ HASH_MEMORY_KIB: '8', HASH_PASSES: '1' })
  const bare = await lab.program('bare-server.ts')
  const pairs = []
  for (let n = 0; n <= rounds; n++) {
    progress(n === 0 ? 'overhead: warm-up' : `overhead: round ${n} of ${rounds}`)
    const measure = async (subject: typeof bare) => {
      const bodies = await issueSignUps(lab.redis, 40_000)
      const { perSecond, replies } = await closedLoop(subject, { connections: 32, seconds, bodies })
      const failed = replies.filter(({ status }) => status !== 201).length
      if (failed > 0) throw new Error(`${failed} sign-ups failed`)
      return perSecond
    }
    const serviceFirst = n % 2 === 0
    const first = await measure(serviceFirst ? service : bare)
    const second = await measure(serviceFirst ? bare : service)
    if (n > 0) pairs.push(serviceFirst ? ([first, second] as const) : ([second, first] as const))
  }
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
