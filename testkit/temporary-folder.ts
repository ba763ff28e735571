import { existsSync, mkdtempSync, readFileSync } from 'node:fs'
import { readdir, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

/** Creates a folder. Its name has the id of this process, so that a later one can delete it if this one is killed. */
export function createTemporaryFolder(parent = tmpdir()): string {
  return mkdtempSync(join(parent, `mobile-signup-${process.pid}-`))
}

/** Deletes the folders of processes that were killed, or that ended at their first failure. */
export async function deleteLeftovers(parent = tmpdir()): Promise<void> {
  for (const name of await readdir(parent)) {
    const [, pid] = /^mobile-signup-(\d+)-/.exec(name) ?? []
    if (pid === undefined || isRunning(Number(pid))) continue
    const folder = join(parent, name)
    // Postgres may still be stopping. Redis stops faster.
    if (isPostgresRunning(join(folder, 'postgres'))) continue
    // It may belong to another user, or another process may be deleting it.
    await rm(folder, { recursive: true, force: true }).catch(() => undefined)
  }
}

function isPostgresRunning(data: string): boolean {
  const file = join(data, 'postmaster.pid')
  return existsSync(file) && isRunning(Number.parseInt(readFileSync(file, 'utf8'), 10))
}

function isRunning(pid: number): boolean {
  try {
    process.kill(pid, 0)
    return true
  } catch (error) {
    // It belongs to another user.
    return error instanceof Error && 'code' in error && error.code === 'EPERM'
  }
}
