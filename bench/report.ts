import { execFileSync } from 'node:child_process'
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { arch, availableParallelism, cpus, platform, release, totalmem } from 'node:os'
import { fileURLToPath } from 'node:url'
import { median, round } from './statistics.js'

type Target = { atLeast: number } | { atMost: number }

/** One figure of a benchmark. */
export interface Row {
  /** `npm run bench -- compare` finds the same figure in two result files by its name. */
  name: string
  figure: number
  /** The lowest and the highest of the rounds whose median the figure is. */
  spread?: readonly [number, number]
  /** What the figure must meet. docs/performance.md defines P1 to P8. */
  target?: Target
  /** The measurements behind the figure. */
  raw: unknown
}

/** The content of a result file. */
export interface Results {
  at: string
  commit: string
  /** Whether `src` differed from the commit. */
  changed: boolean
  machine: Record<string, unknown>
  versions: Record<string, string>
  rows: (Row & { met?: boolean })[]
}

export const resultsFolder = new URL('./results/', import.meta.url)
mkdirSync(resultsFolder, { recursive: true })

/**
 * Returns a row whose figure is the median of the values of the rounds.
 *
 * @param raw the measurements behind the values, if they are not the values themselves
 */
export function medianRow(
  name: string,
  values: readonly number[],
  target?: Target,
  raw: unknown = values.map(round)
): Row {
  const spread = [Math.min(...values), Math.max(...values)] as const
  return { name, figure: median(values), spread, ...(target && { target }), raw }
}

/** Returns a row whose figure is the median of the ratios. */
export function ratioRow(name: string, pairs: readonly (readonly [number, number])[], target?: Target): Row {
  const ratios = pairs.map(([numerator, denominator]) => numerator / denominator)
  return medianRow(
    name,
    ratios,
    target,
    pairs.map((pair) => pair.map(round))
  )
}

/** Shows the current step on standard error: a terminal gets one changing line, a log gets a line for each step. */
export function showProgress(step: string): void {
  process.stderr.write(process.stderr.isTTY ? `\r\x1b[K${step}` : `${step}\n`)
}

export function clearProgress(): void {
  if (process.stderr.isTTY) showProgress('')
}

export function printTable(rows: readonly Row[]): void {
  clearProgress()
  for (const row of rows) {
    const columns = [
      row.name.padEnd(62),
      String(round(row.figure)).padStart(8),
      (row.spread?.map(round).join('–') ?? '').padEnd(11),
      describeTarget(row).padEnd(7),
      describeVerdict(row).padEnd(8)
    ]
    process.stdout.write(`${columns.join('  ')}${JSON.stringify(row.raw)}\n`)
  }
}

function describeTarget({ target }: Row): string {
  if (target === undefined) return ''
  return 'atLeast' in target ? `≥ ${target.atLeast}` : `≤ ${target.atMost}`
}

function describeVerdict(row: Row): string {
  const isMet = meetsTarget(row)
  if (isMet === undefined) return ''
  return isMet ? 'met' : 'NOT MET'
}

function meetsTarget({ figure, target }: Row): boolean | undefined {
  if (target === undefined) return undefined
  return 'atLeast' in target ? figure >= target.atLeast : figure <= target.atMost
}

/**
 * Writes a result file with the machine, the versions and the commit.
 *
 * @returns its path
 */
export function writeResults(name: string, rows: readonly Row[], storeVersions: Record<string, string> = {}): string {
  const packages = ['fastify', '@node-rs/argon2', 'ioredis', 'pg', 'autocannon']
  const results: Results = {
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
      ...storeVersions,
      ...Object.fromEntries(packages.map((packageName) => [packageName, packageVersion(packageName)]))
    },
    rows: rows.map((row) => {
      const met = meetsTarget(row)
      return { ...row, ...(met !== undefined && { met }) }
    })
  }
  const file = fileURLToPath(new URL(`${name}.json`, resultsFolder))
  writeFileSync(file, `${JSON.stringify(results, null, 2)}\n`)
  return file
}

function git(...args: string[]): string {
  return execFileSync('git', args, { encoding: 'utf8' }).trim()
}

function packageVersion(name: string): string {
  return JSON.parse(readFileSync(new URL(`../node_modules/${name}/package.json`, import.meta.url), 'utf8')).version
}
