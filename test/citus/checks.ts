/** A promise that was checked on the cluster. */
export interface Check {
  isMet: boolean
}

export function print(line: string): void {
  process.stdout.write(`${line}\n`)
}

/** Prints and returns a check. */
export function check(promise: string, isMet: boolean): Check {
  print(`${isMet ? 'ok    ' : 'NOT OK'} ${promise}`)
  return { isMet }
}
