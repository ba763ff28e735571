import { setTimeout as sleep } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { ServerProcess } from '../../testkit/server-process.js'
import { type Check, check, print } from './checks.js'
import type { Node } from './cluster.js'

/**
 * Tests of what the service promises its clients. Of the others that write users, logins is not among them, because it looks for
 * a lock of a row on the node that it is connected to. On Citus that lock is on another node.
 */
const files = ['sign-up', 'races', 'password-reset', 'sessions', 'claims', 'epochs', 'faults', 'journey']

/** A test that fails may wait for a lock that it holds itself. */
const timeoutMs = 300_000

const root = fileURLToPath(new URL('../..', import.meta.url))

/** Runs test files, one after the other, on the database of the cluster through one of its nodes. */
export async function runContractTests(node: Node): Promise<Check[]> {
  print(`\ntests of the contract through ${node.name}`)
  const checks: Check[] = []
  for (const file of files) {
    await node.query('TRUNCATE users')
    const path = `test/${file}.test.ts`
    const test = ServerProcess.start(['--import=tsx/esm', path], {
      cwd: root,
      env: { ...process.env, TESTBED_DATABASE_URL: node.url, TAP_TIMEOUT: `${timeoutMs / 1_000}` }
    })
    const timer = new AbortController()
    await Promise.race([test.exit, sleep(timeoutMs, undefined, { signal: timer.signal }).catch(() => undefined)])
    timer.abort()
    const hasPassed = test.child.exitCode === 0
    const [, count = 0] = /^# \{ total: (\d+)/m.exec(test.stdout) ?? []
    checks.push(check(`${path}: ${count} assertions`, hasPassed))
    if (!hasPassed) print(`${test.stdout}${test.stderr}`)
    test.dispose()
  }
  return checks
}
