import { existsSync } from 'node:fs'
import { delimiter, join } from 'node:path'

/** The path of the first of some programs that is on the PATH; undefined if none is. */
export function findProgram(...names: string[]): string | undefined {
  const directories = process.env.PATH?.split(delimiter) ?? []
  return names.flatMap((name) => directories.map((directory) => join(directory, name))).find((path) => existsSync(path))
}
