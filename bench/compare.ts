import { readFileSync } from 'node:fs'
import { round } from './statistics.js'

interface Results {
  commit: string
  rows: { name: string; figure: number }[]
}

/** Prints two result files side by side: each figure that both have, and the new one in parts of the old. */
export function compare([oldFile, newFile]: readonly string[]): void {
  if (oldFile === undefined || newFile === undefined) throw new Error('usage: npm run bench -- compare OLD NEW')
  const [before, after] = [oldFile, newFile].map((file): Results => JSON.parse(readFileSync(file, 'utf8')))
  process.stdout.write(`${'figure'.padEnd(66)}${short(before)}  ${short(after)}  new ÷ old\n`)
  for (const { name, figure } of before?.rows ?? []) {
    const now = after?.rows.find((row) => row.name === name)?.figure
    if (now === undefined) continue
    const columns = [figure, now, now / figure].map((value) => String(round(value)).padStart(8))
    process.stdout.write(`${name.padEnd(66)}${columns.join('  ')}\n`)
  }
}

const short = (results: Results | undefined) => (results?.commit ?? '').slice(0, 8).padStart(8)
