import { readFileSync, writeFileSync } from 'node:fs'
import type { Test } from 'tap'

/**
 * Compares the generated part of a page with what it must be, or writes it if WRITE_DOCS is set (`npm run docs`). The part
 * stands between the lines `<!-- NAME:start -->` and `<!-- NAME:end -->`.
 */
export function checkGeneratedPart(t: Test, page: string, name: string, expected: string): void {
  const file = new URL(`../${page}`, import.meta.url)
  const document = readFileSync(file, 'utf8')
  const [startLine, endLine] = [`<!-- ${name}:start -->\n`, `<!-- ${name}:end -->\n`]
  const [before, rest = ''] = document.split(startLine)
  const [actual, after] = rest.split(endLine)
  if (after === undefined) throw new Error(`${page} has no part ${name}`)
  if (process.env.WRITE_DOCS) writeFileSync(file, `${before}${startLine}${expected}${endLine}${after}`)
  else t.equal(actual, expected, `${page} has the current ${name}`)
}

/** Returns a Markdown table. */
export function markdownTable(heading: string[], rows: string[][]): string {
  const line = (cells: string[]) => `| ${cells.join(' | ')} |\n`
  return [line(heading), `|${'---|'.repeat(heading.length)}\n`, ...rows.map(line)].join('')
}
