import { showProgress } from './report.js'

/**
 * Measures two sides in turn. The speed of a shared machine drifts, so each round measures both sides, and every other
 * round starts with the second side.
 *
 * @param label is shown with each round
 * @returns the two results of each round
 */
export async function alternate<A, B>(
  label: string,
  rounds: number,
  measureA: (round: number) => Promise<A>,
  measureB: (round: number) => Promise<B>
): Promise<[A, B][]> {
  const results: [A, B][] = []
  for (let round = 0; round < rounds; round++) {
    showProgress(`${label}: round ${round + 1} of ${rounds}`)
    const early = round % 2 === 1 ? await measureB(round) : undefined
    const a = await measureA(round)
    results.push([a, early ?? (await measureB(round))])
  }
  return results
}
