/** The choices of one run. The first ones are given; after them each is the default, which is option 0, or random. */
export class Choices {
  /** The choices so far: the chosen option, and the number of options. */
  readonly made: { option: number; options: number }[] = []

  /** @param later chooses after the given ones; by default the default option */
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
 * Enumerates all runs with a number of deviations, depth first: of choices that are not the default option. A run with few
 * deviations is easy to read, and most bugs of concurrency need few (delay-bounded scheduling).
 *
 * @param run makes its choices with `choices.choose`, and makes the same ones again after the same choices
 * @returns the number of runs; `run` ends the search by returning true
 */
export async function enumerate(deviations: number, run: (choices: Choices) => Promise<boolean>): Promise<number> {
  let runs = 0
  let given: number[] | undefined = []
  while (given !== undefined) {
    const choices = new Choices(given)
    const isExact = given.filter((option) => option > 0).length === deviations
    // A run with fewer deviations leads to others, and has been checked before.
    if (isExact) runs++
    if ((await run(choices)) && isExact) return runs
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
