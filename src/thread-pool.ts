/*
 * The first import of an entry point. It gives libuv's thread pool a thread for each hash, and four more for name look-ups: a
 * name server that is silent holds a thread for seconds.
 */
import { availableParallelism } from 'node:os'

/** Returns what `loadConfig` will take as HASH_THREADS if the pool is large enough. */
function hashThreads(): number {
  const { HASH_THREADS = '' } = process.env
  return /^[1-9]\d{0,2}$/.test(HASH_THREADS) ? Number(HASH_THREADS) : availableParallelism()
}

const [major = 0, minor = 0] = process.versions.node.split('.').map(Number)
// libuv reads the size when the pool is first used. Before 24.3, Node.js has used it to load this file.
const isPoolUnused = major > 24 || (major === 24 && minor >= 3)
if (isPoolUnused) process.env.UV_THREADPOOL_SIZE ||= `${hashThreads() + 4}`
