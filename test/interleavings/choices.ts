/** An option that was taken, and how many options there were. */
interface Choice {
  option: number
  options: number
}

/** Makes the choices of one run. It repeats the given choices first. After them `chooseNext` decides. */
export class Choices {
  /** The choices so far. */
  readonly made: Choice[] = []

  /** @param chooseNext returns an option; without it, always the default option 0 */
  constructor(
    private readonly given: readonly Choice[],
    private readonly chooseNext: (options: number) => number = () => 0
  ) {}

  /** @throws if a given choice had another number of options: then the search would skip orders, or repeat them */
  choose(options: number): number {
    const given = this.given[this.made.length]
    if (given !== undefined && given.options !== options) {
      throw new Error(
        `choice ${this.made.length + 1} had ${given.options} options, and has ${options} when it is repeated`
      )
    }
    const option = given?.option ?? this.chooseNext(options)
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
  let given: Choice[] | undefined = []
  while (given !== undefined) {
    const choices = new Choices(given)
    runs++
    if (await run(choices)) break
    given = next(choices.made, deviations)
  }
  return runs
}

/** Returns the given choices of the next run in depth-first order. */
function next(made: readonly Choice[], deviations: number): Choice[] | undefined {
  for (const [index, { option, options }] of [...made.entries()].reverse()) {
    const before = made.slice(0, index)
    const left = deviations - before.filter((choice) => choice.option > 0).length
    if (left > 0 && option + 1 < options) return [...before, { option: option + 1, options }]
  }
  return undefined
}
