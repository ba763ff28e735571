import { execFile } from 'node:child_process'
import { availableParallelism } from 'node:os'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'

/** The defaults of HASH_MEMORY_KIB and HASH_PASSES. */
export const defaultParameters = { memoryKib: 12_288, passes: 3 }

export interface BareHashesOptions {
  seconds: number
  threads?: number
  memoryKib?: number
  passes?: number
}

export interface BareHashes {
  /** Of all threads together. */
  perSecond: number
  /** Wall time of one hash, in milliseconds. */
  hashMs: number
  /** CPU time of one hash, in milliseconds. */
  cpuMs: number
}

const program = fileURLToPath(new URL('./bare-hashes-process.js', import.meta.url))

/**
 * The yardstick of the hashes: a process that computes argon2id and does nothing else. By default with as many threads and
 * the same parameters as the service.
 */
export async function bareHashes(options: BareHashesOptions): Promise<BareHashes> {
  const { seconds, threads, memoryKib, passes } = {
    threads: availableParallelism(),
    ...defaultParameters,
    ...options
  }
  const args = [threads, seconds, memoryKib, passes].map(String)
  const { stdout } = await promisify(execFile)(process.execPath, [program, ...args])
  const { perSecond, cpuMs }: Pick<BareHashes, 'perSecond' | 'cpuMs'> = JSON.parse(stdout)
  return { perSecond, hashMs: (1_000 * threads) / perSecond, cpuMs }
}
