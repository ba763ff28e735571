import { readFileSync } from 'node:fs'
import type { Results } from './report.js'
import { round } from './statistics.js'

/** Prints every figure that two result files have in common, with the ratio of the new one to the old one. */
export function compare(oldFile: string, newFile: string): void {
  const [before, after] = [readResults(oldFile), readResults(newFile)]
  process.stdout.write(`${'figure'.padEnd(66)}${shortCommit(before)}  ${shortCommit(after)}  new ÷ old\n`)
  for (const { name, figure } of before.rows) {
    const newFigure = after.rows.find((row) => row.name === name)?.figure
    if (newFigure === undefined) continue
    const columns = [figure, newFigure, newFigure / figure].map((value) => String(round(value)).padStart(8))
    process.stdout.write(`${name.padEnd(66)}${columns.join('  ')}\n`)
  }
}

const readResults = (file: string): Results => JSON.parse(readFileSync(file, 'utf8'))

const shortCommit = ({ commit }: Results) => commit.slice(0, 8).padStart(8)
