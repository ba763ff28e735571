import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { fileURLToPath } from 'node:url'
import type { Test } from 'tap'
import type { Environment } from '../src/config/config.js'
import { sessionSecret, stores, until } from './helper.js'

const server = fileURLToPath(new URL('../dist/server.js', import.meta.url))

/** The built service as a process of its own, with nothing of this environment but the PATH. */
export function start(t: Test, env: Environment, cwd?: string) {
  const child = spawn(process.execPath, [server], {
    cwd,
    env: { PATH: process.env.PATH, PORT: '0', HASH_MEMORY_KIB: '64', HASH_PASSES: '1', ...env }
  })
  const output = { stdout: '', stderr: '' }
  child.stdout.setEncoding('utf8').on('data', (text) => {
    output.stdout += text
  })
  child.stderr.setEncoding('utf8').on('data', (text) => {
    output.stderr += text
  })
  const exit = once(child, 'exit')
  t.teardown(() => child.kill('SIGKILL'))
  return { child, output, exit }
}

/** Waits for a text on standard output; fails with all there is if the process ends before. */
export async function said(run: ReturnType<typeof start>, text: RegExp): Promise<RegExpExecArray> {
  let found: RegExpExecArray | null = null
  await until(async () => {
    found = text.exec(run.output.stdout)
    return found !== null || hasEnded(run.child)
  })
  if (found === null) throw new Error(`ended without ${text}: ${run.output.stdout}${run.output.stderr}`)
  return found
}

const hasEnded = ({ exitCode, signalCode }: ChildProcess) => exitCode !== null || signalCode !== null

/** Names the stores of this file, as production does. */
export const named = { DATABASE_URL: stores.databaseUrl, REDIS_URL: stores.redisUrl, SESSION_SECRET: sessionSecret }
