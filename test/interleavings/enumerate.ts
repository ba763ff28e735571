/** An option that a run has taken, from 0, and how many there were. Option 0 is the usual one. */
interface Choice {
  option: number
  options: number
}

/**
 * Runs every sequence of choices with at most so many deviations, depth first. A deviation is a choice that is not option 0. A
 * run with few deviations is easy to read, and most bugs of concurrency need few (delay-bounded scheduling).
 *
 * @param run the same choices must lead to the same options; it returns true to end the search
 * @returns the number of runs
 * @throws if the options differ when a choice is repeated: then the search would skip orders, or repeat them
 */
export async function enumerate(
  deviations: number,
  run: (choose: (options: number) => number) => Promise<boolean>
): Promise<number> {
  let runs = 0
  for (let given: readonly Choice[] | undefined = []; given !== undefined; runs++) {
    const repeated: readonly Choice[] = given
    const made: Choice[] = []
    const isOver = await run((options) => {
      const former = repeated[made.length]
      if (former && former.options !== options) throw new Error(`${former.options} options have become ${options}`)
      made.push({ option: former?.option ?? 0, options })
      return former?.option ?? 0
    })
    given = isOver ? undefined : next(made, deviations)
  }
  return runs
}

/** Returns the first choices of the next run in depth-first order. */
function next(made: readonly Choice[], deviations: number): readonly Choice[] | undefined {
  for (const [index, { option, options }] of [...made.entries()].reverse()) {
    const before = made.slice(0, index)
    const left = deviations - before.filter((choice) => choice.option > 0).length
    if (left > 0 && option + 1 < options) return [...before, { option: option + 1, options }]
  }
  return undefined
}
