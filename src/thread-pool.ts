/*
 * The first import of an entry point. It gives libuv's thread pool one thread for each hash. With more threads, each hash wakes
 * another one, whose caches are cold: with four threads for two hashes at a time, two cores did a tenth less sign-ups/s.
 */
import { availableParallelism } from 'node:os'

const [major = 0, minor = 0] = process.versions.node.split('.').map(Number)
// libuv reads the size when the pool is first used. Before 24.3, Node.js has used it to load this file.
const isPoolUnused = major > 24 || (major === 24 && minor >= 3)
if (isPoolUnused) process.env.UV_THREADPOOL_SIZE ||= process.env.HASH_THREADS || `${availableParallelism()}`
