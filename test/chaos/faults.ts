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
}

/** Causes a random fault, and waits until it has ended. @returns what it was */
export async function causeFault({ instances, postgres, redisProxy }: Targets, random: SeededRandom): Promise<string> {
  await sleep(random.between(200, 1_500))
  const instance = random.oneOf(...instances)
  const [store, proxy] = random.oneOf(['Redis', redisProxy] as const, ['Postgres', postgres.address] as const)
  switch (random.oneOf('kill', 'kill', 'pause', 'restart', 'reset', 'reset', 'stall', 'failover')) {
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
      return `resets of all connections to ${store}`
    case 'stall':
      await proxy.apply('stall')
      await sleep(random.between(100, 1_500))
      await proxy.heal()
      return `stalls of ${store}`
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
