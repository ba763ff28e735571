import { EventEmitter, once } from 'node:events'
import type { Writable } from 'node:stream'
import type { Test } from 'tap'
import { HashQueue } from '#src/passwords/hash-queue.js'
import { until } from './until.js'

/** From now on every hash of an application holds its thread until all are released, at the latest after the test. */
export function holdHashes(t: Test) {
  const barrier = new EventEmitter()
  const released = once(barrier, 'release')
  const { run } = HashQueue.prototype
  let joined = 0
  const { restore } = t.intercept(HashQueue.prototype, 'run', {
    value(this: HashQueue, job: () => Promise<unknown>, client?: Writable) {
      joined++
      barrier.emit('joined')
      return run.call(this, () => released.then(job), client)
    }
  })
  const release = () => {
    restore()
    barrier.emit('release')
  }
  t.teardown(release)
  return {
    release,
    /** Resolves when one more hash has joined the queue. */
    joined: () => once(barrier, 'joined').then(() => undefined),
    untilJoined: (count: number) => until(`${count} hashes have joined`, () => joined === count)
  }
}
