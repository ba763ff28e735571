/*
 * npm run interleavings: requests for one mobile in every order of their steps, on a real Redis and a real Postgres. After
 * each run every guarantee is checked.
 *
 * INTERLEAVINGS_DEVIATIONS (2): all runs with at most so many choices that are not the usual one: another client goes first,
 * a round trip is lost, a process dies, the lease passes. INTERLEAVINGS_RANDOM (0) further runs of each scenario have any
 * number of them; INTERLEAVINGS_SEED repeats those. `bugs` as an argument: instead, each of some seeded bugs must be found.
 */
import { randomInt } from 'node:crypto'
import { startStores } from '../testkit/private-stores.js'
import { SeededRandom } from './chaos/seeded-random.js'
import { bugs } from './interleavings/bugs.js'
import { Choices, enumerate } from './interleavings/choices.js'
import { type Scenario, scenarios } from './interleavings/scenarios.js'
import { runOnce } from './interleavings/schedule.js'
import { buildSystem, type Patch, type System } from './interleavings/system.js'

const deviationsMax = Number(process.env.INTERLEAVINGS_DEVIATIONS || 2)
const randomRuns = Number(process.env.INTERLEAVINGS_RANDOM || 0)
const seed = Number(process.env.INTERLEAVINGS_SEED || randomInt(2 ** 31))

/** How many faults a run may have. */
const faultsMax = 2

/** In a random run, the share of choices that are not the usual one. */
const deviationShare = 0.3

const stores = await startStores()
let hasFailed = false

if (process.argv[2] === 'bugs') await findBugs()
else await checkScenarios()
await stores.stop()
// A request whose process has died never ends, so the applications are still open.
process.exit(hasFailed ? 1 : 0)

async function checkScenarios(): Promise<void> {
  process.stdout.write(
    `interleavings: at most ${deviationsMax} deviations, ${randomRuns} random runs, INTERLEAVINGS_SEED=${seed}\n`
  )
  for (const scenario of scenarios) {
    const system = await systemFor(scenario, [])
    const startedAt = Date.now()
    const { runs, violation } = await search(system, scenario, deviationsMax)
    const random = violation ? { runs: 0 } : await searchAtRandom(system, scenario)
    const found = violation ?? random.violation
    process.stdout.write(
      `${scenario.name.padEnd(40)} ${String(runs).padStart(8)} runs ${String(random.runs).padStart(8)} at random ` +
        `${String(Math.round((Date.now() - startedAt) / 1_000)).padStart(5)} s  ${found ? 'VIOLATED' : 'ok'}\n`
    )
    if (found) {
      hasFailed = true
      process.stdout.write(found)
    }
    await system.close()
  }
}

async function findBugs(): Promise<void> {
  for (const { name, patches } of bugs) {
    const violation = await findBug(patches)
    process.stdout.write(`${name}: ${violation === undefined ? 'NOT FOUND' : 'found'}\n${violation ?? ''}\n`)
    hasFailed ||= violation === undefined
  }
}

/** Searches with no deviation, then with one, and so on. Returns the first violation. */
async function findBug(patches: readonly Patch[]): Promise<string | undefined> {
  for (let deviations = 0; deviations <= deviationsMax; deviations++) {
    for (const scenario of scenarios) {
      const system = await systemFor(scenario, patches)
      const { violation } = await search(system, scenario, deviations)
      await system.close()
      if (violation !== undefined) return violation
    }
  }
  return undefined
}

function systemFor({ guesses }: Scenario, patches: readonly Patch[]): Promise<System> {
  return buildSystem(stores, patches, guesses === undefined ? {} : { SMS_CODE_ATTEMPTS: `${guesses}` })
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
