/*
 * npm run interleavings: requests for one mobile in every order of their steps, on a real Redis and a real Postgres. After
 * each run every guarantee is checked.
 *
 * INTERLEAVINGS_DEVIATIONS (2): all runs with at most so many choices that are not the usual one: another client goes first,
 * a round trip is lost, a process dies, the lease passes. `bugs` as an argument: instead, each of some seeded bugs must be found.
 */
import { numberFrom } from '../testkit/environment.js'
import { startStores } from '../testkit/private-stores.js'
import { bugs } from './interleavings/bugs.js'
import { enumerate } from './interleavings/enumerate.js'
import { Run, type System, startSystem } from './interleavings/run.js'
import { type Scenario, scenarios } from './interleavings/scenarios.js'

const [command, ...rest] = process.argv.slice(2)
if ((command !== undefined && command !== 'bugs') || rest.length > 0) {
  process.stderr.write('Usage: npm run interleavings [-- bugs]\n')
  process.exit(2)
}

const deviationsMax = numberFrom('INTERLEAVINGS_DEVIATIONS', 2)
const print = (line: string) => process.stdout.write(`${line}\n`)

const stores = await startStores()
const areAllAsExpected = await (command === 'bugs' ? findBugs() : checkScenarios())
await stores.stop()
process.exitCode = areAllAsExpected ? 0 : 1

async function checkScenarios(): Promise<boolean> {
  let areOk = true
  for (const [name, scenario] of Object.entries<Scenario>(scenarios)) {
    const system = await startSystem(stores, scenario)
    const { runs, violation } = await search(system, scenario, deviationsMax)
    await system.app.close()
    print(`${name}: ${runs} runs, ${violation === undefined ? 'ok' : `VIOLATED\n${violation}`}`)
    areOk &&= violation === undefined
  }
  return areOk
}

async function findBugs(): Promise<boolean> {
  let areFound = true
  for (const [name, bug] of Object.entries(bugs)) {
    const scenario = scenarios[bug.scenario]
    const system = await startSystem(stores, scenario, bug)
    let found: string | undefined
    for (let deviations = 0; deviations <= deviationsMax && found === undefined; deviations++) {
      const { violation } = await search(system, scenario, deviations)
      if (violation) found = `found, ${deviations} deviations, ${bug.scenario}\n${violation}`
    }
    await system.app.close()
    print(`${name}: ${found ?? 'NOT FOUND'}`)
    areFound &&= found !== undefined
  }
  return areFound
}

/** Runs a scenario with at most so many deviations. Returns the first violation with the steps that led to it. */
async function search(system: System, scenario: Scenario, deviations: number) {
  let violation: string | undefined
  const runs = await enumerate(deviations, async (choose) => {
    const run = new Run(system, scenario, choose)
    const violations = await run.play()
    if (violations.length === 0) return false
    const steps = run.log.map((line, index) => `  ${index + 1}. ${line}\n`)
    violation = [...steps, ...new Set(violations.map((text) => `  VIOLATION ${text}\n`))].join('')
    return true
  })
  return { runs, violation }
}
