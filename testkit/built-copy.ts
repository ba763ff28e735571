import { cp } from 'node:fs/promises'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { createTemporaryFolder, deleteLeftovers } from './temporary-folder.js'

const inProject = (path: string) => fileURLToPath(new URL(`../${path}`, import.meta.url))

/**
 * Copies the built service, so that a test can change its files. The copy is in node_modules, where it finds its packages.
 *
 * @returns the folder of the copy, which contains `dist`
 */
export async function copyBuild(): Promise<string> {
  const parent = inProject('node_modules/.cache')
  await deleteLeftovers(parent)
  const copy = createTemporaryFolder(parent)
  await cp(inProject('dist'), join(copy, 'dist'), { recursive: true, dereference: true })
  // Without it Node takes the files for CommonJS, because they are in node_modules.
  await cp(inProject('package.json'), join(copy, 'package.json'))
  return copy
}
