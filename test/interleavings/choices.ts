/** Makes the choices of one run. It repeats the given choices first. After them `later` decides. */
export class Choices {
  /** Each choice so far: the option that was taken, and how many options there were. */
  readonly made: { option: number; options: number }[] = []

  /** @param later returns an option; without it, always the default option 0 */
  constructor(
    private readonly given: readonly number[],
    private readonly later: (options: number) => number = () => 0
  ) {}

  choose(options: number): number {
    const option = this.given[this.made.length] ?? this.later(options)
    this.made.push({ option, options })
    return option
  }
}

/**
 * Runs every sequence of choices with at most so many deviations, depth first. A deviation is a choice that is not the default
 * option. A run with few deviations is easy to read, and most bugs of concurrency need few (delay-bounded scheduling).
 *
 * @param run calls `choices.choose` for each choice. The same choices must lead to the same options. It returns true to end
 * the search.
 * @returns the number of runs
 */
export async function enumerate(deviations: number, run: (choices: Choices) => Promise<boolean>): Promise<number> {
  let runs = 0
  let given: number[] | undefined = []
  while (given !== undefined) {
    const choices = new Choices(given)
    runs++
    if (await run(choices)) break
    given = next(choices.made, deviations)
  }
  return runs
}

/** Returns the given choices of the next run in depth-first order. */
function next(made: Choices['made'], deviations: number): number[] | undefined {
  for (let index = made.length - 1; index >= 0; index--) {
    const { option, options } = made[index] ?? { option: 0, options: 0 }
    const before = made.slice(0, index).map((choice) => choice.option)
    const left = deviations - before.filter((other) => other > 0).length
    if (left > 0 && option + 1 < options) return [...before, option + 1]
  }
  return undefined
}
