const violationsShown = 20

/** What has happened, and which promises were broken. */
export class Report {
  private readonly counts = new Map<string, number>()
  readonly violations: string[] = []

  count(event: string): void {
    this.counts.set(event, (this.counts.get(event) ?? 0) + 1)
  }

  violate(violation: string): void {
    this.violations.push(violation)
  }

  print(): void {
    for (const [event, count] of [...this.counts].sort()) {
      process.stdout.write(`${`${count}`.padStart(7)}  ${event}\n`)
    }
    for (const violation of this.violations.slice(0, violationsShown)) {
      process.stdout.write(`VIOLATION ${violation}\n`)
    }
  }
}
