import { availableParallelism } from 'node:os'
import { bareHashes } from './bare-hashes.js'
import type { Lab } from './lab.js'
import { closedLoop, issueSignUps } from './load.js'
import { progress, type Row } from './report.js'
import { median, percentile, round } from './statistics.js'

/** P1, P2 and P4: how near the service keeps the cores to hashing and nothing else. */
export async function limit(lab: Lab, short = false): Promise<Row[]> {
  const levels = short ? [32] : [1, 2, 8, 32, 128]
  const seconds = 3
  const threads = availableParallelism()
  const service = await lab.service()
  const rows: Row[] = []
  await closedLoop(service, { connections: 32, seconds: 2, bodies: await issueSignUps(lab.redis, 2_000) })

  for (const connections of levels) {
    // The level with the targets has more: the machine's speed drifts by more than what is to be seen.
    const rounds = connections === 32 && !short ? 9 : 3
    const pairs = []
    for (let n = 0; n < rounds; n++) {
      progress(`limit: ${connections} connections, round ${n + 1} of ${rounds}`)
      const bodies = await issueSignUps(lab.redis, 500 * threads * seconds)
      const bare = await bareHashes({ threads, seconds })
      const signUps = await closedLoop(service, { connections, seconds, bodies })
      const failed = signUps.replies.filter(({ status }) => status !== 201).length
      if (failed > 0) throw new Error(`${failed} sign-ups failed`)
      pairs.push({ bare, signUps, ms: signUps.replies.map(({ ms }) => ms) })
    }
    const ratios = pairs.map(({ bare, signUps }) => signUps.perSecond / bare.perSecond)
    rows.push({
      name: `${connections === 32 ? 'P1: ' : ''}sign-ups/s ÷ bare hashes/s, ${connections} connections`,
      figure: median(ratios),
      ...(connections === 32 && { target: { atLeast: 0.9 } }),
      raw: pairs.map(({ bare, signUps }) => [round(signUps.perSecond), round(bare.perSecond)])
    })
    if (connections !== 32) continue
    rows.push({
      name: 'P2: CPU of a sign-up in the service ÷ CPU of a bare hash',
      figure: median(pairs.map(({ bare, signUps }) => signUps.cpuMs / bare.cpuMs)),
      target: { atMost: 1.08 },
      raw: pairs.map(({ bare, signUps }) => [round(signUps.cpuMs), round(bare.cpuMs)])
    })
    rows.push({
      name: 'P4: p99 ÷ p50 of sign-ups, 32 connections',
      figure: median(pairs.map(({ ms }) => percentile(ms, 0.99) / median(ms))),
      target: { atMost: 1.5 },
      raw: pairs.map(({ ms }) => [round(percentile(ms, 0.99)), round(median(ms))])
    })
  }
  await service.stop()
  return rows
}
