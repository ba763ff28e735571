import { setTimeout as sleep } from 'node:timers/promises'
import type { FaultProxy } from '../../testkit/fault-proxy.js'
import type { ReplicatedPostgres } from '../../testkit/replicated-postgres.js'
import type { SeededRandom } from './seeded-random.js'
import type { ServiceInstance } from './service-instance.js'

/** What the faults happen to. */
export interface Targets {
  instances: [ServiceInstance, ...ServiceInstance[]]
  postgres: ReplicatedPostgres
  redisProxy: FaultProxy
  /** In front of the receiver of events. */
  receiverProxy: FaultProxy
}

/** Causes a random fault, and waits until it has ended. @returns what it was */
export async function causeFault(targets: Targets, random: SeededRandom): Promise<string> {
  const { instances, postgres, redisProxy, receiverProxy } = targets
  await sleep(random.between(200, 1_500))
  const instance = random.oneOf(...instances)
  const [peer, proxy] = random.oneOf(
    ['Redis', redisProxy] as const,
    ['Postgres', postgres.address] as const,
    ['the receiver of events', receiverProxy] as const
  )
  switch (random.oneOf('kill', 'kill', 'pause', 'restart', 'reset', 'reset', 'stall', 'away', 'failover')) {
    case 'kill':
      await instance.kill()
      await sleep(random.between(0, 500))
      await instance.start()
      return 'instances killed'
    case 'pause':
      await instance.pause(random.between(500, 3_000))
      return 'instances paused'
    case 'restart': {
      const mode = random.oneOf('fast', 'immediate')
      await postgres.restart(mode)
      // After a restart commits are visible that the standby lacks. Promoted now, also a synchronous one would lose them.
      await postgres.untilReplicated()
      return `restarts of Postgres, ${mode}`
    }
    case 'reset':
      await proxy.apply('reset')
      return `resets of all connections to ${peer}`
    case 'stall':
      await proxy.apply('stall')
      await sleep(random.between(100, 1_500))
      await proxy.heal()
      return `stalls of ${peer}`
    case 'away':
      await receiverProxy.apply('refuse')
      await sleep(random.between(500, 3_000))
      await receiverProxy.heal()
      return 'absences of the receiver of events'
    case 'failover':
      // Only asynchronous replication may fall behind. Otherwise no sign-up would be answered meanwhile.
      if (postgres.mode === 'asynchronous') {
        await postgres.stopReplicating()
        await sleep(random.between(0, 1_000))
      }
      await postgres.failOver()
      await postgres.addStandby()
      return 'failovers of Postgres'
  }
}
