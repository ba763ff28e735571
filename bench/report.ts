import { execFileSync } from 'node:child_process'
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { arch, availableParallelism, cpus, platform, release, totalmem } from 'node:os'
import { fileURLToPath } from 'node:url'
import { median, round } from './statistics.js'

/** One figure of a benchmark. */
export interface Row {
  name: string
  figure: number
  /** The lowest and the highest of the rounds whose median the figure is. */
  spread?: readonly [number, number]
  /** What the figure must meet. docs/performance.md defines P1 to P8. */
  target?: { atLeast: number } | { atMost: number } | undefined
  /** The measurements behind the figure. */
  raw: unknown
}

export const resultsFolder = new URL('./results/', import.meta.url)
mkdirSync(resultsFolder, { recursive: true })

/** Returns a row whose figure is the median of the values of the rounds. */
export function medianRow(name: string, values: readonly number[], target?: Row['target'], raw?: unknown): Row {
  const spread = [Math.min(...values), Math.max(...values)] as const
  return { name, figure: median(values), spread, target, raw: raw ?? values.map(round) }
}

/** Returns a row whose figure is the median of the ratios. */
export function ratioRow(name: string, pairs: readonly (readonly [number, number])[], target?: Row['target']): Row {
  const ratios = pairs.map(([numerator, denominator]) => numerator / denominator)
  return medianRow(
    name,
    ratios,
    target,
    pairs.map((pair) => pair.map(round))
  )
}

export const showProgress = (step: string) => process.stderr.write(`${step}\n`)

export function printTable(rows: readonly Row[]): void {
  for (const row of rows) {
    const target =
      row.target && Object.entries(row.target).map(([kind, value]) => `${kind === 'atMost' ? '≤' : '≥'} ${value}`)
    const columns = [
      row.name.padEnd(70),
      `${round(row.figure)}`.padStart(8),
      (row.spread?.map(round).join('–') ?? '').padEnd(12),
      `${target ?? ''}`.padEnd(7),
      { true: 'met', false: 'NOT MET', undefined: '' }[`${isMet(row)}`].padEnd(8)
    ]
    process.stdout.write(`${columns.join('  ')}${JSON.stringify(row.raw)}\n`)
  }
}

function isMet({ figure, target }: Row): boolean | undefined {
  if (target === undefined) return undefined
  return 'atLeast' in target ? figure >= target.atLeast : figure <= target.atMost
}

/** Writes a result file with the machine, the versions and the commit. @returns its path */
export function writeResults(name: string, rows: readonly Row[], storeVersions: Record<string, string>): string {
  const git = (...args: string[]) => execFileSync('git', args, { encoding: 'utf8' }).trim()
  const packages = ['fastify', '@node-rs/argon2', 'ioredis', 'pg', 'autocannon'].map((name) => {
    const file = new URL(`../node_modules/${name}/package.json`, import.meta.url)
    return [name, JSON.parse(readFileSync(file, 'utf8')).version]
  })
  const results = {
    at: new Date().toISOString(),
    commit: git('rev-parse', 'HEAD'),
    /** Whether `src` differs from the commit. */
    changed: git('status', '--porcelain', 'src') !== '',
    machine: {
      cpu: cpus()[0]?.model,
      cores: availableParallelism(),
      memoryGib: Math.round(totalmem() / 2 ** 30),
      system: `${platform()} ${release()} ${arch()}`
    },
    versions: { node: process.version, ...storeVersions, ...Object.fromEntries(packages) },
    rows: rows.map((row) => ({ ...row, met: isMet(row) }))
  }
  const file = fileURLToPath(new URL(`${name}.json`, resultsFolder))
  writeFileSync(file, `${JSON.stringify(results, null, 2)}\n`)
  return file
}
