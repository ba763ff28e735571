import { showProgress } from './report.js'

/**
 * Measures two sides in turn. The speed of a shared machine drifts, so each round measures both sides, and every other
 * round starts with the second side.
 *
 * @param measureA is called with the number of the round, from 0
 * @param label is shown with each round; without it, no progress is shown
 * @returns the two results of each round
 */
export async function alternate<A, B>(
  rounds: number,
  measureA: (round: number) => Promise<A>,
  measureB: (round: number) => Promise<B>,
  label?: string
): Promise<[A, B][]> {
  const results: [A, B][] = []
  for (let round = 0; round < rounds; round++) {
    if (label !== undefined) showProgress(`${label}: round ${round + 1} of ${rounds}`)
    if (round % 2 === 0) {
      const a = await measureA(round)
      results.push([a, await measureB(round)])
    } else {
      const b = await measureB(round)
      results.push([await measureA(round), b])
    }
  }
  return results
}
