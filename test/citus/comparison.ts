import { availableParallelism } from 'node:os'
import { closedLoop, requireStatus, warmUp } from '../../bench/load.js'
import { issueSignUps } from '../../bench/request-bodies.js'
import { median, round } from '../../bench/statistics.js'
import type { PrivateStores } from '../../testkit/private-stores.js'
import { print } from './checks.js'
import type { Node } from './cluster.js'
import { startService } from './service.js'

const rounds = 7
const seconds = 3

/** Waits that a busy machine does not reach, so that nothing is refused. */
const patient = { STORE_TIMEOUT_MS: '20000', HASH_MAX_WAIT_MS: '20000' }

/** More sign-ups than any machine completes in one round. */
const signUpsPerRound = 4_000 * availableParallelism() * seconds

/**
 * Compares the sign-ups per second through several nodes with those through the first one. The speed of a shared machine
 * drifts, so each round measures all of them, and begins with another one.
 */
export async function compareWithPlain(nodes: readonly Node[], stores: PrivateStores): Promise<void> {
  print(`\nsign-ups/s with a hash of 1 MiB, ${rounds} rounds of ${seconds} s`)
  const services = await Promise.all(nodes.map((node) => startService(node, stores, patient)))
  const rates: number[][] = nodes.map(() => [])
  try {
    for (const service of services) await warmUp(service, stores.redis)
    for (let turn = 0; turn < rounds * nodes.length; turn++) {
      const index = (turn + Math.floor(turn / nodes.length)) % nodes.length
      const service = services[index]
      if (service === undefined) continue
      const bodies = await issueSignUps(stores.redis, signUpsPerRound)
      const { perSecond, replies } = await closedLoop(service, { seconds, bodies })
      requireStatus(replies, 201, 'sign-ups')
      rates[index]?.push(perSecond)
    }
  } finally {
    for (const service of services) await service.stop()
  }
  const [base = []] = rates
  for (const [index, node] of nodes.entries()) {
    const own = rates[index] ?? []
    const ratio = median(own.map((rate, turn) => rate / (base[turn] ?? Number.NaN)))
    print(
      `  ${node.name.padEnd(12)} ${round(median(own))}/s, ÷ plain ${round(ratio)}  ${JSON.stringify(own.map(round))}`
    )
  }
}
