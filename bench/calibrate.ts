/* npm run calibrate: finds which of OWASP's argon2id settings, which are of equal strength, this machine computes fastest. */
import { availableParallelism } from 'node:os'
import { owaspArgon2id } from '#src/config/config.js'
import { bareHashes } from './bare-hashes.js'
import { round } from './statistics.js'

const cores = availableParallelism()

/** CPU time of a sign-up besides its hash, in ms, if stores and clients share the cores: see docs/performance.md. */
const otherMs = 3

/** Memory of an instance without that of its hashes, in MiB: measured at 3 × capacity, rounded up. */
const instanceMib = 200

const print = (text: string) => process.stdout.write(`${text}\n`)
const printRow = (...columns: (string | number)[]) => print(columns.map((column) => `${column}`.padStart(10)).join(''))

/** 1, 2, 4 and so on below the number of cores, and that number. */
const threadCounts = [1, 2, 4, 8, 16, 32, 64].filter((count) => count < cores).concat(cores)

printRow('KiB', 'passes', 'threads', 'hashes/s', 'ms/hash', 'MiB')
let fastest = { memoryKib: 0, passes: 0, perSecond: 0 }
for (const [memoryKib, passes] of owaspArgon2id) {
  for (const threads of threadCounts) {
    const { perSecond, hashMs } = await bareHashes(1, { memoryKib, passes }, threads)
    printRow(memoryKib, passes, threads, round(perSecond), round(hashMs), round((memoryKib * threads) / 1_024))
    // With a thread for each core, which is the default.
    if (threads === cores && perSecond > fastest.perSecond) fastest = { memoryKib, passes, perSecond }
  }
}

const signUpsPerSecond = (1_000 * cores) / ((1_000 * cores) / fastest.perSecond + otherMs)
print(`
The fastest setting on this machine:

HASH_MEMORY_KIB=${fastest.memoryKib}
HASH_PASSES=${fastest.passes}

This machine completes about ${Math.round(signUpsPerSecond)} sign-ups/s. For S sign-ups/s you need N = S ÷ ${round(signUpsPerSecond / cores)} such cores,
N × ${Math.ceil(fastest.memoryKib / 1_024)} MiB for the hashes, and ${instanceMib} MiB for each instance.`)
