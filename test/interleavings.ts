/*
 * npm run interleavings: requests for one mobile in every order of their steps, on a real Redis and a real Postgres. After
 * each run every guarantee is checked.
 *
 * INTERLEAVINGS_DEVIATIONS (2): all runs with at most so many choices that are not the usual one: another client goes first,
 * a round trip is lost, a process dies, the lease passes. INTERLEAVINGS_RANDOM (0) further runs of each scenario have any
 * number of them; INTERLEAVINGS_SEED repeats those. `bugs` as an argument: instead, each of some seeded bugs must be found.
 */
import { randomInt } from 'node:crypto'
import { numberFrom } from '../testkit/environment.js'
import { startStores } from '../testkit/private-stores.js'
import { SeededRandom } from '../testkit/seeded-random.js'
import { bugs } from './interleavings/bugs.js'
import { Choices, enumerate } from './interleavings/choices.js'
import { type Scenario, scenarios } from './interleavings/scenarios.js'
import { runOnce } from './interleavings/schedule.js'
import { type System, Systems } from './interleavings/system.js'

const [command, ...rest] = process.argv.slice(2)
if ((command !== undefined && command !== 'bugs') || rest.length > 0) {
  process.stderr.write('Usage: npm run interleavings [-- bugs]\n')
  process.exit(2)
}

const deviationsMax = numberFrom('INTERLEAVINGS_DEVIATIONS', 2)
const randomRuns = numberFrom('INTERLEAVINGS_RANDOM', 0)
const seed = numberFrom('INTERLEAVINGS_SEED', randomInt(2 ** 31))

/** How many faults a run may have. */
const faultsMax = 2

/** In a random run, the share of choices that are not the usual one. */
const deviationShare = 0.3

const stores = await startStores()
if (command === 'bugs') await findBugs()
else await checkScenarios()
await stores.stop()

async function checkScenarios(): Promise<void> {
  process.stdout.write(
    `interleavings: at most ${deviationsMax} deviations, ${randomRuns} random runs, INTERLEAVINGS_SEED=${seed}\n`
  )
  const systems = new Systems(stores, [])
  for (const scenario of scenarios) {
    const system = await systems.get(scenario)
    const startedAt = Date.now()
    const { runs, violation } = await search(system, scenario, deviationsMax)
    const random = violation ? { runs: 0 } : await searchAtRandom(system, scenario)
    const found = violation ?? random.violation
    process.stdout.write(
      `${scenario.name.padEnd(44)} ${String(runs).padStart(8)} runs ${String(random.runs).padStart(8)} at random ` +
        `${String(Math.round((Date.now() - startedAt) / 1_000)).padStart(5)} s  ${found ? 'VIOLATED' : 'ok'}\n`
    )
    if (found) {
      process.exitCode = 1
      process.stdout.write(found)
    }
  }
  await systems.close()
}

async function findBugs(): Promise<void> {
  for (const { name, scenario: scenarioName, patches } of bugs) {
    const scenario = scenarios.find((candidate) => candidate.name === scenarioName)
    if (scenario === undefined) throw new Error(`there is no scenario ${scenarioName}`)
    const systems = new Systems(stores, patches)
    const found = await findBug(await systems.get(scenario), scenario)
    await systems.close()
    process.stdout.write(
      found ? `${name}: found, ${found.deviations} deviations\n${found.violation}\n` : `${name}: NOT FOUND\n`
    )
    if (!found) process.exitCode = 1
  }
}

/** Searches with no deviation, then with one, and so on. Returns the first violation. */
async function findBug(system: System, scenario: Scenario) {
  for (let deviations = 0; deviations <= deviationsMax; deviations++) {
    const { violation } = await search(system, scenario, deviations)
    if (violation !== undefined) return { deviations, violation }
  }
  return undefined
}

/** Runs a scenario with at most so many deviations. Returns the first violation with the steps that led to it. */
async function search(system: System, scenario: Scenario, deviations: number) {
  let violation: string | undefined
  const runs = await enumerate(deviations, async (choices) => {
    violation = await violationOf(system, scenario, choices)
    return violation !== undefined
  })
  return { runs, violation }
}

async function searchAtRandom(system: System, scenario: Scenario) {
  const random = new SeededRandom(seed)
  const choose = (options: number) => (random.next() < deviationShare ? Math.floor(random.next() * options) : 0)
  for (let runs = 0; runs < randomRuns; runs++) {
    const violation = await violationOf(system, scenario, new Choices([], choose))
    if (violation !== undefined) return { runs, violation }
  }
  return { runs: randomRuns }
}

async function violationOf(system: System, scenario: Scenario, choices: Choices): Promise<string | undefined> {
  const { log, violations } = await runOnce(system, scenario, choices, faultsMax)
  if (violations.length === 0) return undefined
  const steps = log.map((line, index) => `  ${String(index + 1).padStart(2)}. ${line}\n`).join('')
  return `  ${scenario.name}\n${steps}${violations.map((violation) => `  VIOLATION ${violation}\n`).join('')}`
}
