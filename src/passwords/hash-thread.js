// JavaScript, so that a thread needs no TypeScript loader when tests run the sources.
import { constants, getPriority, setPriority } from 'node:os'
import { parentPort, workerData } from 'node:worker_threads'
import { hashSync, verifySync } from '@node-rs/argon2'

/** @type {{ parameters: import('@node-rs/argon2').Options, niceness: number }} */
const { parameters, niceness } = workerData

// On Linux each thread has its own priority. Elsewhere this call would change the whole process.
if (process.platform === 'linux') setPriority(Math.min(constants.priority.PRIORITY_LOW, getPriority() + niceness))

/** The clock of hash-pool.ts. */
const nowMs = () => Number(process.hrtime.bigint()) / 1e6

parentPort?.on('message', (/** @type {import('./hash-pool.js').HashJob} */ { password, phc }) => {
  const startedAt = nowMs()
  /** @returns {{ result: string | boolean } | { error: unknown }} */
  function compute() {
    try {
      return { result: phc === undefined ? hashSync(password, parameters) : verifySync(phc, password) }
    } catch (error) {
      return { error }
    }
  }
  parentPort?.postMessage({ ...compute(), startedAt, endedAt: nowMs() })
})
parentPort?.postMessage('ready')
