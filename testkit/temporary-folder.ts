import { mkdtempSync, statfsSync } from 'node:fs'
import { readdir, rm, stat, utimes } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { Test } from 'tap'

/** How often a process shows that it still uses its folders, and after what time without a sign they are left over. */
const signIntervalMs = 60_000
const leftoverAfterMs = 20 * signIntervalMs

const prefix = 'mobile-signup-'

/** Creates a folder. While this process lives, the folder is no older than a minute, so that others do not delete it. */
export function createTemporaryFolder(parent = tmpdir()): string {
  const folder = mkdtempSync(join(parent, prefix))
  const sign = setInterval(() => {
    const now = new Date()
    utimes(folder, now, now).catch(() => clearInterval(sign))
  }, signIntervalMs)
  sign.unref()
  return folder
}

/** Creates a folder, and deletes it after the test. */
export function temporaryFolderFor(t: Test): string {
  const folder = createTemporaryFolder()
  t.teardown(() => rm(folder, { recursive: true }))
  return folder
}

/**
 * Returns the folder for the data of stores: in memory where there is room (a container has 64 MiB by default). To copy the thousand
 * files of a Postgres takes a disk up to two seconds, and memory 0.1 s.
 */
export function memoryFolder(): string {
  try {
    const { bavail, bsize } = statfsSync('/dev/shm')
    if (bavail * bsize > 2 ** 30) return '/dev/shm'
  } catch {
    // Only Linux has it.
  }
  return tmpdir()
}

/** Deletes the folders of processes that were killed, or that ended at their first failure. */
export async function deleteLeftovers(): Promise<void> {
  for (const parent of new Set([tmpdir(), memoryFolder()])) {
    for (const name of await readdir(parent)) {
      if (!name.startsWith(prefix)) continue
      const folder = join(parent, name)
      // It may belong to another user, or another process may be deleting it.
      await deleteIfOld(folder).catch(() => undefined)
    }
  }
}

async function deleteIfOld(folder: string): Promise<void> {
  const { mtimeMs } = await stat(folder)
  if (mtimeMs < Date.now() - leftoverAfterMs) await rm(folder, { recursive: true })
}
