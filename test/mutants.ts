/*
 * npm run mutation: StrykerJS makes one change in an area of the sources at a time, and runs the test files of the area until
 * one fails.
 * A mutant that survives must be in test/mutants/equivalents.ts, with the reason why no test finds it.
 *
 * Arguments: names of areas, or all by default.
 */
import { readFile } from 'node:fs/promises'
import { relative } from 'node:path'
import { Stryker } from '@stryker-mutator/core'
import { type Area, areas } from './mutants/areas.js'
import { equivalents } from './mutants/equivalents.js'
import { type Counts, idsOf, print, printSummary, selectByName } from './mutants/summary.js'

type Options = ConstructorParameters<typeof Stryker>[0]
type Result = Awaited<ReturnType<Stryker['runMutationTest']>>[number]

const options: Options = {
  ignorePatterns: ['dist', '.tap', '.data', 'bench/results'],
  plugins: ['@stryker-mutator/tap-runner', './test/mutants/not-mutated.js'],
  ignorers: ['not-mutated'],
  testRunner: 'tap',
  coverageAnalysis: 'perTest',
  concurrency: 2,
  // Patient, because a run that takes longer counts as a kill: the machine may be busier than in the first run.
  timeoutMS: 60_000,
  timeoutFactor: 4,
  dryRunTimeoutMinutes: 10,
  reporters: ['progress-append-only']
}

// For tap in the test files: a file ends at its first failure, and a test that hangs fails.
process.env.TAP_BAIL = '1'
process.env.TAP_TIMEOUT = '120'

const known = idsOf(equivalents)
/** The ids of the mutants that have survived. */
const survived = new Set<string>()
const summary = new Map<string, Counts>()
for (const area of selectByName(areas, process.argv.slice(2))) summary.set(area.name, await testArea(area))
printSummary(summary)
const unexpectedlyKilled = process.argv.length > 2 ? [] : [...known].filter((id) => !survived.has(id))
for (const id of unexpectedlyKilled) print(`listed, but it did not survive: ${id}`)
process.exit(unexpectedlyKilled.length > 0 || [...summary.values()].some(({ survive }) => survive > 0) ? 1 : 0)

/** Tests the mutants of an area, and prints those that survive without a reason. */
async function testArea({ sources, tests, isThread = false }: Area): Promise<Counts> {
  const results = await new Stryker({
    ...options,
    mutate: [...sources],
    buildCommand: `test/mutants/build.sh${isThread ? ' threads' : ''}`,
    tap: {
      testFiles: tests.map((test) => `test/${test}.test.ts`),
      nodeArgs: ['--import=tsx/esm', ...(isThread ? ['--import=./test/mutants/cover-all.js'] : [])]
    }
  }).runMutationTest()
  const tested = results.filter(({ status }) => status !== 'Ignored')
  const slow = tested.filter(
    ({ status, statusReason = '' }) => status === 'Timeout' || statusReason.includes('timeout!')
  )
  for (const mutant of slow) print(`takes too long: ${await identify(mutant)}`)
  const survivors = await Promise.all(
    tested.filter(({ status }) => status === 'Survived' || status === 'NoCoverage').map(identify)
  )
  for (const id of survivors) survived.add(id)
  const unexplained = survivors.filter((id) => !known.has(id))
  for (const id of unexplained) print(`survives: ${id}`)
  return {
    mutants: tested.length,
    killed: tested.length - survivors.length,
    equivalent: survivors.length - unexplained.length,
    survive: unexplained.length
  }
}

/** Returns the file and the changed line, with the place as `«before → after»`. */
async function identify({ fileName, location: { start, end }, replacement = '' }: Result): Promise<string> {
  const lines = (await readFile(fileName, 'utf8')).split('\n').slice(start.line - 1, end.line)
  const [first = '', last = ''] = [lines[0], lines.at(-1)]
  const before =
    lines.length === 1
      ? first.slice(start.column - 1, end.column - 1)
      : `${first.slice(start.column - 1)} … ${last.slice(0, end.column - 1).trim()}`
  const change = `«${before} → ${shorten(replacement)}»`
  return `${relative('', fileName)}: ${first.slice(0, start.column - 1).trimStart()}${change}${last.slice(end.column - 1)}`
}

/** Shortens a text of several lines to its first and its last one. */
function shorten(text: string): string {
  const lines = text.split('\n')
  return lines.length === 1 ? text : `${lines[0]} … ${lines.at(-1)?.trim()}`
}
