import { readFileSync, writeFileSync } from 'node:fs'
import type { Test } from 'tap'
import { readVariables } from '#src/config/config.js'

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

/** A variable as docs/operating.md lists it. */
export interface VariableDescription {
  readonly name: string
  readonly shownDefault: string
  readonly meaning: string
}

/** Describes every variable that `loadConfig` reads. */
export function describeVariables(): VariableDescription[] {
  const [development, production] = [false, true].map((isProduction) => {
    const descriptions: VariableDescription[] = []
    readVariables((name, _parser, whenAbsent, meaning, shownDefault = `${whenAbsent ?? ''}`) => {
      descriptions.push({ name, shownDefault, meaning })
      return whenAbsent
    }, isProduction)
    return descriptions
  })
  const descriptions = (development ?? []).map((description, index) => {
    const inProduction = production?.[index]?.shownDefault ?? description.shownDefault
    const { shownDefault } = description
    return inProduction === shownDefault
      ? description
      : { ...description, shownDefault: `${shownDefault}; in production ${inProduction}` }
  })
  return [
    { name: 'NODE_ENV', shownDefault: '', meaning: '`production` turns the checks of production on.' },
    ...descriptions
  ]
}
