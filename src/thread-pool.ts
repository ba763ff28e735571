/*
 * The first import of an entry point. It gives libuv's thread pool one thread for each hash. With more threads, each hash wakes
 * another one, whose caches are cold: with four threads for two hashes at a time, two cores did a tenth less sign-ups/s.
 */
import { readdir } from 'node:fs/promises'
import { availableParallelism, setPriority } from 'node:os'

const [major = 0, minor = 0] = process.versions.node.split('.').map(Number)
// libuv reads the size when the pool is first used. Before 24.3, Node.js has used it to load this file.
const isPoolUnused = major > 24 || (major === 24 && minor >= 3)
if (isPoolUnused) process.env.UV_THREADPOOL_SIZE ||= process.env.HASH_THREADS || `${availableParallelism()}`

/** A third of the share of a thread of the usual priority, 0: less would starve the hashes beside other work on the same cores. */
const poolPriority = 5

/**
 * Lowers the priority of the threads of libuv's pool, so that the event loop does not wait for a core while they hash: the p99 of
 * 300 wrong codes a second fell from three times a hash to less than one. Only Linux has a priority for each thread.
 *
 * Call it before any other thread is started: Node.js does not tell the ids, but the threads of the pool start together, after V8's.
 */
export async function lowerPoolPriority(threadCount: number): Promise<void> {
  try {
    // Any job starts the pool.
    const ids = (await readdir('/proc/self/task')).map(Number).sort((a, b) => a - b)
    for (const id of ids.slice(-threadCount)) setPriority(id, poolPriority)
  } catch {
    // Another system.
  }
}
