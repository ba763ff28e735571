import { progress } from './report.js'

/**
 * Measures two sides in turn, the one that begins changing from round to round, after a round that warms both up.
 *
 * @returns a pair for each round
 */
export async function alternate<T>(
  name: string,
  rounds: number,
  measureOurs: () => Promise<T>,
  measureTheirs: () => Promise<T>
): Promise<[ours: T, theirs: T][]> {
  const pairs: [T, T][] = []
  for (let n = 0; n <= rounds; n++) {
    progress(n === 0 ? `${name}: warm-up` : `${name}: round ${n} of ${rounds}`)
    const oursFirst = n % 2 === 0
    const first = await (oursFirst ? measureOurs() : measureTheirs())
    const second = await (oursFirst ? measureTheirs() : measureOurs())
    pairs.push(oursFirst ? [first, second] : [second, first])
  }
  return pairs.slice(1)
}
