import { execFileSync } from 'node:child_process'
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { arch, availableParallelism, cpus, platform, release, totalmem } from 'node:os'
import { fileURLToPath } from 'node:url'
import { round } from './statistics.js'

/** A figure of a benchmark. */
export interface Row {
  name: string
  figure: number
  /** A bound from section 7 of the design. */
  target?: { atLeast: number } | { atMost: number }
  /** The measurements behind the figure. */
  raw: unknown
}

/** What a benchmark says while it works: a line that moves on a terminal, a line for each step in a log. */
export function progress(text: string): void {
  if (process.stderr.isTTY) process.stderr.write(`\r\x1b[K${text}`)
  else process.stderr.write(`${text}\n`)
}

export const resultsFolder = new URL('./results/', import.meta.url)

const met = ({ figure, target }: Row) =>
  target && ('atLeast' in target ? figure >= target.atLeast : figure <= target.atMost)

export function printTable(rows: readonly Row[]): void {
  if (process.stderr.isTTY) progress('')
  for (const row of rows) {
    const { target } = row
    const bound = target === undefined ? '' : 'atLeast' in target ? `≥ ${target.atLeast}` : `≤ ${target.atMost}`
    const verdict = target === undefined ? '' : met(row) ? 'met' : 'NOT MET'
    const line = [row.name.padEnd(62), String(round(row.figure)).padStart(8), bound.padEnd(7), verdict.padEnd(8)].join(
      '  '
    )
    process.stdout.write(`${line}${JSON.stringify(row.raw)}\n`)
  }
}

/** Writes the rows with the machine, the versions and the commit. */
export function writeResults(name: string, rows: readonly Row[], stores: Record<string, string> = {}): string {
  const packageVersion = (packageName: string) =>
    JSON.parse(readFileSync(new URL(`../node_modules/${packageName}/package.json`, import.meta.url), 'utf8')).version
  const packages = ['fastify', '@node-rs/argon2', 'ioredis', 'pg', 'autocannon']
  const git = (...args: string[]) => execFileSync('git', args, { encoding: 'utf8' }).trim()
  const result = {
    at: new Date().toISOString(),
    commit: git('rev-parse', 'HEAD'),
    changed: git('status', '--porcelain', 'src') !== '',
    machine: {
      cpu: cpus()[0]?.model,
      cores: availableParallelism(),
      memoryGib: Math.round(totalmem() / 2 ** 30),
      system: `${platform()} ${release()} ${arch()}`
    },
    versions: {
      node: process.version,
      ...stores,
      ...Object.fromEntries(packages.map((packageName) => [packageName, packageVersion(packageName)]))
    },
    rows: rows.map((row) => ({ ...row, met: met(row) }))
  }
  mkdirSync(resultsFolder, { recursive: true })
  const file = fileURLToPath(new URL(`${name}.json`, resultsFolder))
  writeFileSync(file, `${JSON.stringify(result, null, 2)}\n`)
  return file
}
