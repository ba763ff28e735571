// node bare-hashes-process.js THREADS SECONDS MEMORY_KIB PASSES
// Computes argon2id hashes in THREADS threads for SECONDS seconds, then prints their rate and CPU time as JSON.
// It is JavaScript, so that no TypeScript loader runs in the measured process.
import { once } from 'node:events'
import { isMainThread, parentPort, Worker, workerData } from 'node:worker_threads'
import { hashSync } from '@node-rs/argon2'

const [threads = 1, seconds = 1, memoryCost, timeCost] = process.argv.slice(2).map(Number)

if (isMainThread) {
  const workers = Array.from(
    { length: threads },
    () => new Worker(new URL(import.meta.url), { workerData: { seconds, memoryCost, timeCost } })
  )
  const nextMessages = () => Promise.all(workers.map((worker) => once(worker, 'message')))
  // Every thread has loaded and computed its first hash.
  await nextMessages()
  const cpuBefore = process.cpuUsage()
  for (const worker of workers) worker.postMessage('start')
  const results = (await nextMessages()).map(([result]) => result)
  const { user, system } = process.cpuUsage(cpuBefore)
  const hashes = results.reduce((sum, result) => sum + result.hashes, 0)
  const perSecond = results.reduce((sum, result) => sum + (result.hashes * 1_000) / result.ms, 0)
  process.stdout.write(JSON.stringify({ perSecond, cpuMs: (user + system) / 1_000 / hashes }))
} else {
  const parameters = { memoryCost: workerData.memoryCost, timeCost: workerData.timeCost, parallelism: 1 }
  const hash = () => hashSync('a bench password', parameters)
  hash()
  parentPort?.once('message', () => {
    let hashes = 0
    const startedAt = performance.now()
    while (performance.now() - startedAt < workerData.seconds * 1_000) {
      hash()
      hashes++
    }
    parentPort?.postMessage({ hashes, ms: performance.now() - startedAt })
  })
  parentPort?.postMessage('ready')
}
