import { readFile } from 'node:fs/promises'

/** Where Linux says how it uses transparent huge pages, for example `always [madvise] never`. */
const settingFile = '/sys/kernel/mm/transparent_hugepage/enabled'

/** What to do if {@link areHugePagesOff}. */
export const hugePagesAdvice = `transparent huge pages are off, so each hash is slower; write madvise to ${settingFile}`

/**
 * Returns whether the system gives no transparent huge pages. @node-rs/argon2 asks for them for each hash. Without them a
 * hash of 19 MiB takes about 4,900 page faults instead of 265. Systems without the setting are not known to be affected.
 */
export async function areHugePagesOff(): Promise<boolean> {
  const setting = await readFile(settingFile, 'utf8').catch(() => '')
  return setting.includes('[never]')
}
