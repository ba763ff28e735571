import { execFile } from 'node:child_process'
import { availableParallelism } from 'node:os'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'

/** The defaults of HASH_MEMORY_KIB and HASH_PASSES. */
export const defaultParameters = { memoryKib: 12_288, passes: 3 }

export interface BareHashes {
  /** Of all threads together. */
  perSecond: number
  /** Wall time of one hash, in milliseconds. */
  hashMs: number
}

/** In JavaScript, so that no TypeScript loader runs in the measured process. Two jobs for each thread, so that none ever waits. */
const program = `
  import { hash } from '@node-rs/argon2'
  const [threads, seconds, memoryCost, timeCost] = process.argv.slice(1).map(Number)
  const compute = () => hash('a bench password', { memoryCost, timeCost, parallelism: 1 })
  let count = 0
  async function computeUntil(end) {
    for (; performance.now() < end; count++) await compute()
  }
  await Promise.all(Array.from({ length: threads }, compute))
  const startedAt = performance.now()
  await Promise.all(Array.from({ length: 2 * threads }, () => computeUntil(startedAt + seconds * 1000)))
  console.log(count * 1000 / (performance.now() - startedAt))
`

/**
 * The yardstick of the hashes: a process that computes argon2id and does nothing else. By default with as many threads and
 * the same parameters as the service.
 */
export async function bareHashes(
  seconds: number,
  { memoryKib, passes } = defaultParameters,
  threads = availableParallelism()
): Promise<BareHashes> {
  const args = ['--input-type=module', '--eval', program, ...[threads, seconds, memoryKib, passes].map(String)]
  const env = { PATH: process.env.PATH, UV_THREADPOOL_SIZE: `${threads}` }
  const cwd = fileURLToPath(new URL('..', import.meta.url))
  const { stdout } = await promisify(execFile)(process.execPath, args, { cwd, env })
  const perSecond = Number(stdout)
  return { perSecond, hashMs: (1_000 * threads) / perSecond }
}
