/*
 * npm run calibrate: finds which argon2id setting this machine computes fastest: one of OWASP's, which are of equal strength,
 * or one of them with its memory rounded up to whole huge pages.
 */
import { availableParallelism } from 'node:os'
import { owaspArgon2id } from './config/config.js'
import { HashPool } from './passwords/hash-pool.js'
import { areHugePagesOff, hugePagesAdvice } from './passwords/huge-pages.js'

const secondsEach = 1
const hugePageKib = 2_048
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
printRow('KiB', 'passes', 'threads', 'hashes/s', 'ms/hash', 'MiB')
const results: Result[] = []
for (const [memoryKib, passes] of settings()) {
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
if (await areHugePagesOff()) process.stdout.write(`\nNote: ${hugePagesAdvice}.\n`)

/**
 * Returns OWASP's settings, and those with more memory. What is over a whole huge page takes a page fault for each 4 KiB, and
 * a virtual machine may need more time for these faults than for the whole huge page.
 */
function settings(): (readonly [memoryKib: number, passes: number])[] {
  return owaspArgon2id.flatMap(([kib, passes]) => {
    const wholeKib = Math.ceil(kib / hugePageKib) * hugePageKib
    return wholeKib === kib
      ? [[kib, passes]]
      : [
          [kib, passes],
          [wholeKib, passes]
        ]
  })
}

/** Returns 1, 2, 4 and so on below the number of cores, and that number. */
function threadCounts(): number[] {
  const counts = []
  for (let count = 1; count < cores; count *= 2) counts.push(count)
  return [...counts, cores]
}

/** Returns the hashes/s of so many threads whose queue is never empty. */
async function measure(memoryCost: number, timeCost: number, threads: number): Promise<number> {
  const pool = new HashPool(threads, { memoryCost, timeCost, parallelism: 1 })
  await pool.ready()
  let hashes = 0
  const startedAt = performance.now()
  async function hashRepeatedly(): Promise<void> {
    while (performance.now() - startedAt < secondsEach * 1_000) {
      await pool.hash('a password')
      hashes++
    }
  }
  await Promise.all(Array.from({ length: 3 * threads }, hashRepeatedly))
  const elapsedMs = performance.now() - startedAt
  await pool.close()
  return (hashes * 1_000) / elapsedMs
}

function printRow(...columns: (string | number)[]): void {
  const line = columns.map((column, index) => String(column).padStart(widths[index] ?? 0)).join('')
  process.stdout.write(`${line}\n`)
}

/** Rounds to three significant digits. */
function round(value: number): number {
  return Number(value.toPrecision(3))
}
