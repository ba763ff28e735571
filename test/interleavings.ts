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
import { type Choose, enumerate } from './interleavings/choices.js'
import { type Scenario, scenarios } from './interleavings/scenarios.js'
import { Run } from './interleavings/schedule.js'
import { type System, startSystem } from './interleavings/system.js'

const [command, ...rest] = process.argv.slice(2)
if ((command !== undefined && command !== 'bugs') || rest.length > 0) {
  process.stderr.write('Usage: npm run interleavings [-- bugs]\n')
  process.exit(2)
}

const deviationsMax = numberFrom('INTERLEAVINGS_DEVIATIONS', 2)
const randomRuns = numberFrom('INTERLEAVINGS_RANDOM', 0)
const seed = numberFrom('INTERLEAVINGS_SEED', randomInt(2 ** 31))

/** In a random run, the share of choices that are not the usual one. */
const deviationShare = 0.3

const print = (line: string) => process.stdout.write(`${line}\n`)

const stores = await startStores()
if (command === 'bugs') await findBugs()
else await checkScenarios()
await stores.stop()

async function checkScenarios(): Promise<void> {
  print(`interleavings: at most ${deviationsMax} deviations, ${randomRuns} random runs, INTERLEAVINGS_SEED=${seed}`)
  let allRuns = 0
  for (const [name, scenario] of Object.entries<Scenario>(scenarios)) {
    const system = await startSystem(stores, scenario)
    const startedAt = Date.now()
    const { runs, violation } = await search(system, scenario, deviationsMax)
    const found = violation ?? (await searchAtRandom(system, scenario))
    await system.app.close()
    allRuns += runs
    const seconds = Math.round((Date.now() - startedAt) / 1_000)
    print(`${name}: ${runs} runs, ${seconds} s, ${found === undefined ? 'ok' : `VIOLATED\n${found}`}`)
    if (found !== undefined) process.exitCode = 1
  }
  print(`${allRuns} runs in all, and at most ${randomRuns} at random for each scenario`)
}

async function findBugs(): Promise<void> {
  for (const [name, { scenario: scenarioName, lua, change }] of Object.entries(bugs)) {
    const scenario = scenarios[scenarioName]
    const system = await startSystem(stores, scenario, lua)
    change?.(system.app.mobileSignup)
    let found: string | undefined
    for (let deviations = 0; deviations <= deviationsMax && found === undefined; deviations++) {
      const { violation } = await search(system, scenario, deviations)
      if (violation) found = `found, ${deviations} deviations, ${scenarioName}\n${violation}`
    }
    await system.app.close()
    print(`${name}: ${found ?? 'NOT FOUND'}`)
    if (found === undefined) process.exitCode = 1
  }
}

/** Runs a scenario with at most so many deviations. Returns the first violation with the steps that led to it. */
async function search(system: System, scenario: Scenario, deviations: number) {
  let violation: string | undefined
  const runs = await enumerate(deviations, async (choose) => {
    violation = await violationOf(system, scenario, choose)
    return violation !== undefined
  })
  return { runs, violation }
}

async function searchAtRandom(system: System, scenario: Scenario): Promise<string | undefined> {
  const random = new SeededRandom(seed)
  const choose: Choose = (options) => (random.next() < deviationShare ? Math.floor(random.next() * options) : 0)
  let violation: string | undefined
  for (let runs = 0; runs < randomRuns && violation === undefined; runs++) {
    violation = await violationOf(system, scenario, choose)
  }
  return violation
}

async function violationOf(system: System, scenario: Scenario, choose: Choose): Promise<string | undefined> {
  const run = new Run(system, scenario, choose)
  const violations = await run.play()
  if (violations.length === 0) return undefined
  const steps = run.log.map((line, index) => `${index + 1}. ${line}`)
  const broken = [...new Set(violations)].map((violation) => `VIOLATION ${violation}`)
  return [...steps, ...broken].map((line) => `  ${line}\n`).join('')
}
