/** Mutants that no test can find, and why. */
export interface Equivalents {
  reason: string
  mutants: readonly string[]
}

export interface Counts {
  mutants: number
  killed: number
  equivalent: number
  survive: number
}

const startedAt = Date.now()

export const elapsedSeconds = () => Math.round((Date.now() - startedAt) / 1_000)

export const print = (text: string) => process.stdout.write(`${text}\n`)

/** Returns the ids of all equivalent mutants. */
export function idsOf(equivalents: readonly Equivalents[]): ReadonlySet<string> {
  return new Set(equivalents.flatMap(({ mutants }) => mutants))
}

/**
 * Returns the items with these names. If no name is given, it returns all items.
 *
 * @throws {Error} if there is no item with a name
 */
export function selectByName<T extends { name: string }>(items: readonly T[], names: readonly string[]): readonly T[] {
  const unknown = names.filter((name) => !items.some((item) => item.name === name))
  if (unknown.length > 0) throw new Error(`no such name: ${unknown}; there are ${items.map(({ name }) => name)}`)
  return names.length === 0 ? items : items.filter(({ name }) => names.includes(name))
}

/** Prints a table with a row for each title, and the time since the start. */
export function printSummary(rows: ReadonlyMap<string, Counts>): void {
  const printRow = (title: string, cells: (string | number)[]) =>
    print(`${title.padEnd(16)}${cells.map((cell) => `${cell}`.padStart(11)).join('')}`)
  printRow('', ['mutants', 'killed', 'equivalent', 'survive', 'score'])
  for (const [title, { mutants, killed, equivalent, survive }] of rows) {
    printRow(title, [mutants, killed, equivalent, survive, `${((100 * killed) / mutants).toFixed(1)} %`])
  }
  print(`${elapsedSeconds()} s`)
}
