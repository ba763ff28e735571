/* npm run calibrate: finds which of OWASP's argon2id settings, of equal strength, this machine computes fastest. */
import { availableParallelism } from 'node:os'
import { owaspArgon2id } from '../dist/config/config.js'
import { clearProgress, showProgress } from './report.js'
import { round } from './statistics.js'
import { bareHashes } from './yardsticks/bare-hashes.js'

const seconds = 2
const cores = availableParallelism()

/** Sign-ups/s ÷ bare hashes/s where load, service and stores share the cores: P1, as measured on two cores. */
const signUpsPerHash = 0.9

/** Memory of an instance without that of its hashes, in MiB: measured at 3 × capacity, rounded up. */
const instanceMib = 200

const results = []
for (const [memoryKib, passes] of owaspArgon2id) {
  for (let threads = 1; threads <= cores; threads++) {
    showProgress(`calibrate: ${memoryKib} KiB, ${passes} passes, ${threads} of ${cores} threads`)
    results.push({ memoryKib, passes, threads, ...(await bareHashes({ threads, seconds, memoryKib, passes })) })
  }
}
clearProgress()

process.stdout.write('  KiB  passes  threads  hashes/s  ms/hash  MiB\n')
const widths = [5, 8, 9, 10, 9, 7]
for (const { memoryKib, passes, threads, perSecond, hashMs } of results) {
  const columns = [memoryKib, passes, threads, round(perSecond), round(hashMs), round((memoryKib * threads) / 1_024)]
  process.stdout.write(`${columns.map((value, index) => String(value).padStart(widths[index] ?? 0)).join('')}\n`)
}

const fastest = results.reduce((best, result) => (result.perSecond > best.perSecond ? result : best))
const signUpsPerSecond = fastest.perSecond * signUpsPerHash
const hashMib = Math.ceil(fastest.memoryKib / 1_024)
process.stdout.write(`
The fastest setting on this machine:

HASH_MEMORY_KIB=${fastest.memoryKib}
HASH_PASSES=${fastest.passes}

This machine completes about ${Math.round(signUpsPerSecond)} sign-ups/s. For S sign-ups/s you need N = S ÷ ${round(signUpsPerSecond / cores)} such cores,
N × ${hashMib} MiB for the hashes, and ${instanceMib} MiB for each instance.
`)
