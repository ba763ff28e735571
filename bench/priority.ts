import { availableParallelism } from 'node:os'
import { bareHashes } from './bare-hashes.js'
import type { Lab } from './lab.js'
import { closedLoop, issueSignUps, openLoop } from './load.js'
import { progress, type Row } from './report.js'
import { median, percentile, round } from './statistics.js'

/** P3: a refusal never waits for a hash. */
export async function priority(lab: Lab): Promise<Row[]> {
  const threads = availableParallelism()
  const [rounds, seconds] = [5, 6]
  const service = await lab.service()
  await closedLoop(service, { connections: 32, seconds: 2, bodies: await issueSignUps(lab.redis, 2_000) })
  const results = []
  for (let n = 0; n < rounds; n++) {
    progress(`priority: round ${n + 1} of ${rounds}`)
    const { perSecond } = await bareHashes({ threads, seconds: 3 })
    const hashMs = (1_000 * threads) / perSecond
    const bodies = await issueSignUps(lab.redis, 500 * threads * seconds)
    // Nobody has these codes: the mobiles are none that a code was issued for.
    const wrong = Array.from({ length: 1_000 }, (_, k) => wrongCode(12_000_000 + k))
    const [signUps, refusals] = await Promise.all([
      closedLoop(service, { connections: 32, seconds, bodies }),
      openLoop(service, { perSecond: 300, seconds, bodies: wrong })
    ])
    const unexpected = refusals.filter(({ status }) => status !== 422).length
    if (unexpected > 0) throw new Error(`${unexpected} wrong codes were not answered 422`)
    results.push({
      p99Ms: percentile(
        refusals.map(({ ms }) => ms),
        0.99
      ),
      hashMs,
      signUps: signUps.perSecond
    })
  }
  await service.stop()
  return [
    {
      name: 'P3: p99 of wrong codes, 300/s, under saturation ÷ a bare hash',
      figure: median(results.map(({ p99Ms, hashMs }) => p99Ms / hashMs)),
      target: { atMost: 1 },
      raw: results.map(({ p99Ms, hashMs, signUps }) => [round(p99Ms), round(hashMs), round(signUps)])
    }
  ]
}

/** A valid body with a code that is not there. */
export function wrongCode(number: number): string {
  const password = 'a bench password'
  return JSON.stringify({ mobile: `199${number}`, sms_code: '123456', password, password2: password })
}
