import { execFile } from 'node:child_process'
import type { Environment } from '#src/config/config.js'

/**
 * tap adds a loader to NODE_OPTIONS of each process that a test starts. The loader takes more time than a short command, so `env` removes
 * it again.
 *
 * @returns the arguments of `env`
 */
export const nodeWithoutLoader = (args: readonly string[], env: Environment = {}) => [
  `NODE_OPTIONS=${env.NODE_OPTIONS ?? ''}`,
  process.execPath,
  ...args
]

export interface ExitResult {
  code: number
  stdout: string
  stderr: string
}

/** Runs Node.js until it ends, for at most a minute; then the code is -1. */
export function runNode(args: readonly string[], env: Environment): Promise<ExitResult> {
  // Only the loader measures the coverage.
  const isCoverageMeasured = process.env.TAP_DISABLE_COVERAGE === '0'
  const command = isCoverageMeasured ? [process.execPath, ...args] : nodeWithoutLoader(args, env)
  return new Promise((resolve) => {
    const child = execFile(
      '/usr/bin/env',
      command,
      { env, timeout: 60_000, maxBuffer: 2 ** 24 },
      (_error, stdout, stderr) => resolve({ code: child.exitCode ?? -1, stdout, stderr })
    )
  })
}
