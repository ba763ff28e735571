import { existsSync } from 'node:fs'
import { delimiter, join } from 'node:path'

/** Returns the path of the first of these programs that is on the PATH, or undefined. */
export function findProgram(...names: string[]): string | undefined {
  const directories = process.env.PATH?.split(delimiter) ?? []
  return names.flatMap((name) => directories.map((directory) => join(directory, name))).find((path) => existsSync(path))
}
