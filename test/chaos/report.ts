const violationsShown = 20

/** What has happened, and which promises were broken. */
export class Report {
  private readonly counts = new Map<string, number>()
  readonly violations: string[] = []
  private failoverAt: number | undefined
  private longestOutageMs = 0

  count(event: string): void {
    this.counts.set(event, (this.counts.get(event) ?? 0) + 1)
  }

  /** The address of Postgres leads to the new primary. */
  onFailover(): void {
    this.failoverAt = performance.now()
  }

  /** A sign-up has succeeded that has begun at this time, by `performance.now()`. */
  onSuccess(begunAt: number): void {
    if (this.failoverAt === undefined || begunAt < this.failoverAt) return
    this.longestOutageMs = Math.max(this.longestOutageMs, performance.now() - this.failoverAt)
    this.failoverAt = undefined
  }

  violate(violation: string): void {
    this.violations.push(violation)
  }

  print(): void {
    for (const [event, count] of [...this.counts].sort()) {
      process.stdout.write(`${`${count}`.padStart(7)}  ${event}\n`)
    }
    process.stdout.write(
      `${`${Math.round(this.longestOutageMs)}`.padStart(7)}  ms at most from a failover to a sign-up\n`
    )
    for (const violation of this.violations.slice(0, violationsShown)) {
      process.stdout.write(`VIOLATION ${violation}\n`)
    }
  }
}
