import { Lab } from './lab.js'

export interface BareHashes {
  perSecond: number
  /** The CPU of one hash, in milliseconds. */
  cpuMs: number
}

interface Work {
  threads: number
  seconds: number
  memoryKib?: number
  passes?: number
}

/** The yardstick: nothing but argon2id, in so many threads of a process of its own. */
export function bareHashes({ threads, seconds, memoryKib = 19_456, passes = 2 }: Work): Promise<BareHashes> {
  return Lab.run('bare-hashes-process.js', threads, seconds, memoryKib, passes)
}
