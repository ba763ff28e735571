/* npm run calibrate: which of OWASP's argon2id settings, of equal strength, this machine computes fastest. */
import { availableParallelism } from 'node:os'
import { owaspArgon2id } from '../src/config/config.js'
import { bareHashes } from './bare-hashes.js'
import { progress } from './report.js'
import { round } from './statistics.js'

const seconds = 2
const cores = availableParallelism()

/** The part of the hashes that become sign-ups where load, service and stores share the cores: P1 as measured here. */
const signUpsPerHash = 0.9

/** What an instance needs beside the memory of its hashes, in MiB: measured at 3 × capacity, rounded up. */
const instanceMib = 200

const results = []
for (const [memoryKib, passes] of owaspArgon2id) {
  for (let threads = 1; threads <= cores; threads++) {
    progress(`calibrate: ${memoryKib} KiB, ${passes} passes, ${threads} of ${cores} threads`)
    const { perSecond } = await bareHashes({ threads, seconds, memoryKib, passes })
    results.push({ memoryKib, passes, threads, perSecond })
  }
}
if (process.stderr.isTTY) progress('')

process.stdout.write('  KiB  passes  threads  hashes/s  ms/hash  MiB\n')
for (const { memoryKib, passes, threads, perSecond } of results) {
  const columns = [
    memoryKib,
    passes,
    threads,
    round(perSecond),
    round((1_000 * threads) / perSecond),
    round((memoryKib * threads) / 1_024)
  ]
  const widths = [5, 8, 9, 10, 9, 7]
  process.stdout.write(`${columns.map((value, n) => String(value).padStart(widths[n] ?? 0)).join('')}\n`)
}

const fastest = results.reduce((best, result) => (result.perSecond > best.perSecond ? result : best))
const signUps = fastest.perSecond * signUpsPerHash
const hashMib = Math.ceil(fastest.memoryKib / 1_024)
process.stdout.write(`
The fastest of equal strength here:

HASH_MEMORY_KIB=${fastest.memoryKib}
HASH_PASSES=${fastest.passes}

This machine: about ${Math.round(signUps)} sign-ups/s; for S sign-ups/s take N = S ÷ ${round(signUps / cores)} such cores and N × ${hashMib} MiB, and ${instanceMib} MiB for each instance.
`)
