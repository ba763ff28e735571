/** @throws if the variable is no whole number: a search or a load would then end at once */
export function numberFrom(variable: string, whenAbsent: number): number {
  const value = process.env[variable]
  if (!value) return whenAbsent
  if (!/^\d+$/.test(value)) throw new Error(`${variable} is not a whole number: ${value}`)
  return Number(value)
}
