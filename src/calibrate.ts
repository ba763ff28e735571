/* npm run calibrate: finds which of OWASP's argon2id settings, which are of equal strength, this machine computes fastest. */
import './thread-pool.js'
import { availableParallelism } from 'node:os'
import { hash } from '@node-rs/argon2'
import { defaultPoolThreads, owaspArgon2id } from './config/config.js'

const secondsEach = 1
const cores = availableParallelism()

/** CPU time of a sign-up besides its hash, in ms, if stores and clients share the cores: see docs/performance.md. */
const otherMs = 3

/** Memory of an instance without that of its hashes, in MiB: measured at 3 × capacity, rounded up. */
const instanceMib = 200

interface Result {
  memoryKib: number
  passes: number
  threads: number
  hashesPerSecond: number
}

const widths = [5, 8, 9, 10, 9, 7]

if (Number(process.env.UV_THREADPOOL_SIZE || defaultPoolThreads) < cores) {
  process.stderr.write(`calibrate: set UV_THREADPOOL_SIZE=${cores}, so that each core can hash\n`)
  process.exitCode = 1
} else await calibrate()

async function calibrate(): Promise<void> {
  printRow('KiB', 'passes', 'threads', 'hashes/s', 'ms/hash', 'MiB')
  const results: Result[] = []
  for (const [memoryKib, passes] of owaspArgon2id) {
    for (const threads of threadCounts()) {
      const hashesPerSecond = await measure(memoryKib, passes, threads)
      results.push({ memoryKib, passes, threads, hashesPerSecond })
      const hashMs = (1_000 * threads) / hashesPerSecond
      printRow(memoryKib, passes, threads, round(hashesPerSecond), round(hashMs), round((memoryKib * threads) / 1_024))
    }
  }

  // With a thread for each core, which is the default.
  const fastest = results
    .filter(({ threads }) => threads === cores)
    .reduce((best, result) => (result.hashesPerSecond > best.hashesPerSecond ? result : best))
  const signUpsPerSecond = (1_000 * cores) / ((1_000 * cores) / fastest.hashesPerSecond + otherMs)
  process.stdout.write(`
The fastest setting on this machine:

HASH_MEMORY_KIB=${fastest.memoryKib}
HASH_PASSES=${fastest.passes}

This machine completes about ${Math.round(signUpsPerSecond)} sign-ups/s. For S sign-ups/s you need N = S ÷ ${round(signUpsPerSecond / cores)} such cores,
N × ${Math.ceil(fastest.memoryKib / 1_024)} MiB for the hashes, and ${instanceMib} MiB for each instance.
`)
}

/** Returns 1, 2, 4 and so on below the number of cores, and that number. */
function threadCounts(): number[] {
  const counts = []
  for (let count = 1; count < cores; count *= 2) counts.push(count)
  return [...counts, cores]
}

/** Returns the hashes/s of so many threads. */
async function measure(memoryCost: number, timeCost: number, threads: number): Promise<number> {
  let hashes = 0
  const startedAt = performance.now()
  async function hashRepeatedly(): Promise<void> {
    while (performance.now() - startedAt < secondsEach * 1_000) {
      await hash('a password', { memoryCost, timeCost, parallelism: 1 })
      hashes++
    }
  }
  await Promise.all(Array.from({ length: threads }, hashRepeatedly))
  return (hashes * 1_000) / (performance.now() - startedAt)
}

function printRow(...columns: (string | number)[]): void {
  const line = columns.map((column, index) => String(column).padStart(widths[index] ?? 0)).join('')
  process.stdout.write(`${line}\n`)
}

/** Rounds to three significant digits. */
function round(value: number): number {
  return Number(value.toPrecision(3))
}
