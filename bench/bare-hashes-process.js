// Hashes in THREADS threads for SECONDS seconds: node bare-hashes-process.js THREADS SECONDS MEMORY_KIB PASSES
import { isMainThread, parentPort, Worker, workerData } from 'node:worker_threads'
import { hashSync } from '@node-rs/argon2'

const [threads = 1, seconds = 1, memoryCost, timeCost] = process.argv.slice(2).map(Number)

if (isMainThread) {
  const cpuBefore = process.cpuUsage()
  const rates = await Promise.all(
    Array.from({ length: threads }, () => {
      const worker = new Worker(new URL(import.meta.url), { workerData: { seconds, memoryCost, timeCost } })
      return new Promise((resolve, reject) => worker.once('message', resolve).once('error', reject))
    })
  )
  const { user, system } = process.cpuUsage(cpuBefore)
  const perSecond = rates.reduce((sum, rate) => sum + rate, 0)
  process.stdout.write(JSON.stringify({ perSecond, cpuMs: (user + system) / 1_000 / (perSecond * seconds) }))
} else {
  const options = { memoryCost: workerData.memoryCost, timeCost: workerData.timeCost, parallelism: 1 }
  let hashes = 0
  const startedAt = performance.now()
  while (performance.now() - startedAt < workerData.seconds * 1_000) {
    hashSync('a bench password', options)
    hashes++
  }
  parentPort?.postMessage((hashes * 1_000) / (performance.now() - startedAt))
}
