// Hashes in THREADS threads for SECONDS seconds: node bare-hashes-process.js THREADS SECONDS MEMORY_KIB PASSES
import { once } from 'node:events'
import { isMainThread, parentPort, Worker, workerData } from 'node:worker_threads'
import { hashSync } from '@node-rs/argon2'

const [threads = 1, seconds = 1, memoryCost, timeCost] = process.argv.slice(2).map(Number)

if (isMainThread) {
  const workers = Array.from(
    { length: threads },
    () => new Worker(new URL(import.meta.url), { workerData: { seconds, memoryCost, timeCost } })
  )
  const messages = () => Promise.all(workers.map((worker) => once(worker, 'message')))
  // Each has loaded and made its first hash.
  await messages()
  const cpuBefore = process.cpuUsage()
  for (const worker of workers) worker.postMessage('start')
  const results = (await messages()).map(([result]) => result)
  const { user, system } = process.cpuUsage(cpuBefore)
  const hashes = results.reduce((sum, result) => sum + result.hashes, 0)
  const perSecond = results.reduce((sum, result) => sum + (result.hashes * 1_000) / result.ms, 0)
  process.stdout.write(JSON.stringify({ perSecond, cpuMs: (user + system) / 1_000 / hashes }))
} else {
  const options = { memoryCost: workerData.memoryCost, timeCost: workerData.timeCost, parallelism: 1 }
  hashSync('a bench password', options)
  parentPort?.once('message', () => {
    let hashes = 0
    const startedAt = performance.now()
    while (performance.now() - startedAt < workerData.seconds * 1_000) {
      hashSync('a bench password', options)
      hashes++
    }
    parentPort?.postMessage({ hashes, ms: performance.now() - startedAt })
  })
  parentPort?.postMessage('ready')
}
