/*
 * The yardstick: nothing but argon2id, in so many threads, for so many seconds.
 * Prints {"perSecond": number, "cpuMs": number}: hashes a second, and the CPU of one.
 */
import { Worker } from 'node:worker_threads'

const [threads = 1, seconds = 1, memoryCost = 19_456, timeCost = 2] = process.argv.slice(2).map(Number)

const thread = `
  const { parentPort } = require('node:worker_threads')
  const { hashSync } = require('@node-rs/argon2')
  parentPort.once('message', ({ seconds, options }) => {
    hashSync('a bench password', options)
    let hashes = 0
    const startedAt = performance.now()
    while (performance.now() - startedAt < seconds * 1000) {
      hashSync('a bench password', options)
      hashes++
    }
    parentPort.postMessage((hashes * 1000) / (performance.now() - startedAt))
  })
`

const cpuBefore = process.cpuUsage()
const rates = await Promise.all(
  Array.from({ length: threads }, () => {
    const worker = new Worker(thread, { eval: true, execArgv: [] })
    worker.postMessage({ seconds, options: { memoryCost, timeCost, parallelism: 1 } })
    return new Promise<number>((resolve, reject) => worker.once('message', resolve).once('error', reject))
  })
)
const { user, system } = process.cpuUsage(cpuBefore)
const perSecond = rates.reduce((sum, rate) => sum + rate, 0)
process.stdout.write(JSON.stringify({ perSecond, cpuMs: (user + system) / 1_000 / (perSecond * seconds) }))
