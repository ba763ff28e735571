/*
 * npm run interleavings: requests for one mobile in every order of their round trips, on a real Redis and a real Postgres.
 * After each run the guarantees are checked. With `bugs` as an argument: instead, each seeded bug must be found.
 *
 * INTERLEAVINGS_DEVIATIONS (2, for bugs 1): all runs with at most so many choices that are not the usual one: another client
 * goes first, a round trip is lost, a process dies, the lease passes. A run with few deviations is easy to read, and most bugs
 * of concurrency need few (delay-bounded scheduling).
 */
import { numberFrom } from '../testkit/environment.js'
import { startStores } from '../testkit/private-stores.js'
import { type Bug, bugs } from './interleavings/bugs.js'
import { brokenPromises } from './interleavings/checks.js'
import { type Scenario, scenarios } from './interleavings/scenarios.js'
import { play, type System, startSystem } from './interleavings/scheduler.js'

/** An option that a run has taken, and how many there were. Each that is not 0 is a deviation. */
interface Choice {
  option: number
  options: number
}

const [command] = process.argv.slice(2)
if (command !== undefined && command !== 'bugs') throw new Error('Usage: npm run interleavings [-- bugs]')
const deviations = numberFrom('INTERLEAVINGS_DEVIATIONS', command === 'bugs' ? 1 : 2)
const stores = await startStores()
for (const [name, bug] of Object.entries<Bug | Scenario>(command === 'bugs' ? bugs : scenarios)) {
  const isBug = 'plant' in bug
  const system = await startSystem(stores, isBug ? bug : undefined)
  const { runs, violation } = await search(system, isBug ? scenarios[bug.scenario] : bug)
  await system.app.close()
  const isExpected = isBug ? violation.includes(`BROKEN ${bug.breaks}`) : violation === ''
  if (!isExpected) process.exitCode = 1
  process.stdout.write(`${name}: ${runs} runs, ${isExpected ? 'as expected' : 'NOT AS EXPECTED'}\n${violation}`)
}
await stores.stop()

/** Runs a scenario with every sequence of choices, depth first. Returns the steps of the first violation, or ''. */
async function search(system: System, scenario: Scenario): Promise<{ runs: number; violation: string }> {
  let given: readonly Choice[] | undefined = []
  for (let runs = 1; ; runs++) {
    const former: readonly Choice[] = given
    const choices: Choice[] = []
    const run = await play(system, scenario, (options) => {
      const choice = former[choices.length] ?? { option: 0, options }
      // The search would skip orders, or repeat them.
      if (choice.options !== options) throw new Error(`${choice.options} options have become ${options}`)
      choices.push(choice)
      return choice.option
    })
    const broken = brokenPromises(run).map((promise) => `  BROKEN ${promise}\n`)
    if (broken.length > 0) return { runs, violation: [...run.log.map((line) => `  ${line}\n`), ...broken].join('') }
    given = nextChoices(choices)
    if (given === undefined) return { runs, violation: '' }
  }
}

/** Returns the first choices of the next run in depth-first order. */
function nextChoices(choices: readonly Choice[]): readonly Choice[] | undefined {
  for (const [index, { option, options }] of [...choices.entries()].reverse()) {
    const before = choices.slice(0, index)
    const isDeviationLeft = before.filter((choice) => choice.option > 0).length < deviations
    if (isDeviationLeft && option + 1 < options) return [...before, { option: option + 1, options }]
  }
  return undefined
}
