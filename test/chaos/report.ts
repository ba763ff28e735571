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
    const lines = [...this.counts].sort().map(([event, count]) => `${`${count}`.padStart(7)}  ${event}\n`)
    const violations = this.violations.slice(0, violationsShown).map((violation) => `VIOLATION ${violation}\n`)
    process.stdout.write([...lines, ...violations].join(''))
  }
}
