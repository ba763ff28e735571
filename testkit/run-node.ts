import { execFile } from 'node:child_process'
import type { Environment } from '#src/config/config.js'

/**
 * Returns arguments of `env` that start Node.js without the loader that tap adds to NODE_OPTIONS of each process it sees started. The
 * loader takes longer than a short command.
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
  // The loader measures the coverage.
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
