/* npm run calibrate: finds which of OWASP's argon2id settings, which are of equal strength, this machine computes fastest. */
import { availableParallelism } from 'node:os'
import { owaspArgon2id } from '#src/config/config.js'
import { bareHashes } from './bare-hashes.js'

const cores = availableParallelism()

/** CPU time of a sign-up besides its hash, in ms, if stores and clients share the cores: see docs/performance.md. */
const otherMs = 3

/** Memory of an instance without that of its hashes, in MiB: measured at 3 × capacity, rounded up. */
const instanceMib = 200

const widths = [5, 8, 9, 10, 9, 7]

printRow('KiB', 'passes', 'threads', 'hashes/s', 'ms/hash', 'MiB')
let fastest = { memoryKib: 0, passes: 0, perSecond: 0 }
for (const [memoryKib, passes] of owaspArgon2id) {
  for (const threads of threadCounts()) {
    const { perSecond, hashMs } = await bareHashes({ seconds: 1, threads, memoryKib, passes })
    printRow(memoryKib, passes, threads, round(perSecond), round(hashMs), round((memoryKib * threads) / 1_024))
    // With a thread for each core, which is the default.
    if (threads === cores && perSecond > fastest.perSecond) fastest = { memoryKib, passes, perSecond }
  }
}

const signUpsPerSecond = (1_000 * cores) / ((1_000 * cores) / fastest.perSecond + otherMs)
process.stdout.write(`
The fastest setting on this machine:

HASH_MEMORY_KIB=${fastest.memoryKib}
HASH_PASSES=${fastest.passes}

This machine completes about ${Math.round(signUpsPerSecond)} sign-ups/s. For S sign-ups/s you need N = S ÷ ${round(signUpsPerSecond / cores)} such cores,
N × ${Math.ceil(fastest.memoryKib / 1_024)} MiB for the hashes, and ${instanceMib} MiB for each instance.
`)

/** Returns 1, 2, 4 and so on below the number of cores, and that number. */
function threadCounts(): number[] {
  const counts = []
  for (let count = 1; count < cores; count *= 2) counts.push(count)
  return [...counts, cores]
}

function printRow(...columns: (string | number)[]): void {
  const line = columns.map((column, index) => String(column).padStart(widths[index] ?? 0)).join('')
  process.stdout.write(`${line}\n`)
}

/** Rounds to three significant digits. */
function round(value: number): number {
  return Number(value.toPrecision(3))
}
