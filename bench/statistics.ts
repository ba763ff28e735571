/** Returns the smallest value that a fraction of all values does not exceed (nearest rank), or NaN without values. */
export function percentile(values: readonly number[], fraction: number): number {
  const sorted = values.toSorted((a, b) => a - b)
  return sorted[Math.max(0, Math.ceil(sorted.length * fraction) - 1)] ?? Number.NaN
}

export const median = (values: readonly number[]) => percentile(values, 0.5)

/** Rounds to three significant digits. */
export const round = (value: number) => Number(value.toPrecision(3))
