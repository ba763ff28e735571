import { execFile } from 'node:child_process'
import type { Environment } from '#src/config/config.js'

export interface Outcome {
  code: number
  stdout: string
  stderr: string
}

/**
 * Runs Node.js until it ends.
 *
 * tap gives each process a loader in NODE_OPTIONS, which takes longer than a short command. It stays only if it measures the
 * coverage.
 *
 * @param env by default that of this process
 */
export function runNode(args: readonly string[], env: Environment = process.env): Promise<Outcome> {
  const measuresCoverage = process.env.TAP_DISABLE_COVERAGE === '0'
  const command = [...(measuresCoverage ? [] : [`NODE_OPTIONS=${env.NODE_OPTIONS ?? ''}`]), process.execPath, ...args]
  return new Promise((resolve) => {
    const child = execFile('/usr/bin/env', command, { env, maxBuffer: 2 ** 24 }, (_error, stdout, stderr) =>
      resolve({ code: child.exitCode ?? -1, stdout, stderr })
    )
  })
}
