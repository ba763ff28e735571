/*
 * deploy/try-citus.sh: the service on a Citus cluster. The argument is the folder of the programs of a Postgres in which Citus
 * is installed. Exits with 1 if a check fails. The comparison with a plain Postgres has no target.
 */
import { startStores } from '../testkit/private-stores.js'
import { type Check, print } from './citus/checks.js'
import { type Cluster, startCluster } from './citus/cluster.js'
import { compareWithPlain } from './citus/comparison.js'
import { runContractTests } from './citus/contract.js'
import { checkIds } from './citus/ids.js'
import { loseWorker } from './citus/worker-loss.js'

const [programs] = process.argv.slice(2)
if (programs === undefined) throw new Error('usage: deploy/try-citus.sh PROGRAMS')

// The servers end with this process, however it ends. Their folders are deleted only by the code below.
const interrupted = new Promise<never>((_resolve, reject) => {
  for (const signal of ['SIGINT', 'SIGTERM'] as const) process.once(signal, () => reject(new Error(signal)))
})
interrupted.catch(() => undefined)

const cluster = await startCluster(programs)
try {
  const checks = await tryService(cluster)
  const failed = checks.filter(({ isMet }) => !isMet).length
  print(`\n${checks.length - failed} passed, ${failed} failed`)
  process.exitCode = failed > 0 ? 1 : 0
} finally {
  await cluster.stop()
}

async function tryService({ coordinator, workers, plain }: Cluster): Promise<Check[]> {
  const [worker, lostWorker] = workers
  const stores = await startStores(coordinator.url)
  const steps = async () => [
    ...(await checkIds([coordinator, worker, lostWorker])),
    ...(await runContractTests(coordinator)),
    ...(await runContractTests(worker)),
    ...(await loseWorker({ coordinator, lostWorker, stores, signal: 'SIGKILL' })),
    ...(await loseWorker({ coordinator, lostWorker, stores, signal: 'SIGSTOP' }))
  ]
  try {
    const checks = await Promise.race([steps(), interrupted])
    await Promise.race([compareWithPlain([plain, coordinator, worker], stores), interrupted])
    return checks
  } finally {
    await stores.stop()
  }
}
