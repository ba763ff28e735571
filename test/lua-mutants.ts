/*
 * npm run mutation:lua: changes one place of a Lua script at a time, and runs the tests that cover the script. A test must
 * fail, or the mutant must be in test/lua-mutants/equivalents.ts with the reason why no test can.
 *
 * Arguments: names of scripts, or all by default. With `equivalents` as the first one, the mutants of that table are run:
 * each must survive.
 */
import { startStores } from '../testkit/private-stores.js'
import { equivalents } from './lua-mutants/equivalents.js'
import { firstFailure } from './lua-mutants/first-failure.js'
import { compiledMutants, interpolate, readScripts, type ScriptMutant } from './lua-mutants/scripts.js'
import { Workspace } from './lua-mutants/workspace.js'
import { type Counts, elapsedSeconds, idsOf, print, printSummary, selectByName } from './mutants/summary.js'

const [first, ...others] = process.argv.slice(2)
const areEquivalentsRun = first === 'equivalents'
const names = areEquivalentsRun || first === undefined ? others : [first, ...others]

const known = idsOf(equivalents)
const scripts = await readScripts()
const selectedScripts = selectByName(scripts, names)

// Each run starts a Redis. A Postgres of its own would take longer than most runs.
const stores = await startStores()
process.env.TESTBED_DATABASE_URL = stores.databaseUrl

const all = await compiledMutants(stores.redisUrl, scripts)
const selected = all.filter(({ script }) => selectedScripts.includes(script))
const tested = selected.filter(({ id }) => known.has(id) === areEquivalentsRun)

/** The test files that have found each mutant. */
const killers = new Map<ScriptMutant, string>()
for (const [index, mutant] of tested.entries()) {
  const { script, lua } = mutant
  if (index === 0 || tested[index - 1]?.script.test !== script.test) await checkUnchanged(script.test)
  const failure = await firstFailure(script.test, interpolate(scripts, script.lua), interpolate(scripts, lua))
  if (failure !== undefined) killers.set(mutant, script.test)
  if ((index + 1) % 50 === 0) print(`${index + 1} of ${tested.length}, ${elapsedSeconds()} s`)
}
const surviving = () => tested.filter((mutant) => !killers.has(mutant))
if (surviving().length > 0) await runOtherTests()
await stores.stop()

const missing = [...known].filter((id) => !all.some((mutant) => mutant.id === id))
for (const id of missing) print(`no such mutant any more: ${id}`)
const unexpected = areEquivalentsRun ? [...killers.keys()] : surviving()
for (const mutant of unexpected) print(describe(mutant))
for (const killer of new Set(killers.values())) {
  print(`found by ${killer}: ${[...killers.values()].filter((other) => other === killer).length}`)
}
printSummary(
  new Map([
    ...selectedScripts.map(({ name }) => [name, count(selected.filter(({ script }) => script.name === name))] as const),
    ['all', count(selected)]
  ])
)
process.exit(missing.length + unexpected.length > 0 ? 1 : 0)

async function checkUnchanged(test: string): Promise<void> {
  const testStartedAt = Date.now()
  const failure = await firstFailure(test, '', '')
  if (failure !== undefined) throw new Error(`test/${test}.test.ts fails without a mutant: ${failure}`)
  print(`test/${test}.test.ts takes ${((Date.now() - testStartedAt) / 1_000).toFixed(1)} s`)
}

/** Runs the other test files that cover the scripts of the mutants that have survived so far. */
async function runOtherTests(): Promise<void> {
  const workspace = await Workspace.create()
  for (const test of new Set(surviving().flatMap(({ script }) => script.otherTests))) {
    const limitMs = await workspace.measure(test)
    for (const mutant of surviving().filter(({ script }) => script.otherTests.includes(test))) {
      const result = await workspace.withMutant(mutant, () => workspace.run(test, limitMs))
      if (result !== 'passed') killers.set(mutant, test)
    }
  }
  await workspace.dispose()
}

function describe(mutant: ScriptMutant): string {
  const { script, line, id } = mutant
  const killer = killers.get(mutant)
  return `${killer === undefined ? 'survives' : `found by ${killer}`}: src/${script.file}.ts:${script.line + line} ${id}`
}

function count(mutants: readonly ScriptMutant[]): Counts {
  return {
    mutants: mutants.length,
    killed: mutants.filter((mutant) => killers.has(mutant)).length,
    equivalent: mutants.filter(({ id }) => known.has(id)).length,
    survive: mutants.filter((mutant) => surviving().includes(mutant)).length
  }
}
