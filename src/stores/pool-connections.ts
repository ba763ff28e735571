import type { Pool, PoolClient } from 'pg'

/**
 * How old a connection gets, in ms, ± a fifth. So a second pooler, or a Postgres whose address has moved, gets its share, and the
 * connections of one moment do not end in one moment.
 */
const maxAgeMs = 30 * 60_000

/** Ends the wait of a caller. Without a client it fails. */
type Settle = (error: unknown, client?: PoolClient) => void

/**
 * Lends the connections of a pool. `pool.connect()` alone binds its caller to the connection that it opens. If Postgres takes no
 * more connections, the caller would fail, although another connection of the pool is free a moment later.
 */
export class PoolConnections {
  /** Oldest first. */
  private readonly waiters = new Set<Settle>()
  private readonly endsAt = new WeakMap<PoolClient, number>()

  constructor(
    private readonly pool: Pool,
    private readonly max: number,
    private readonly timeoutMs: number,
    private readonly onOpenError: (error: Error) => void
  ) {
    pool.on('connect', (client) => this.endsAt.set(client, performance.now() + maxAgeMs * (0.8 + 0.4 * Math.random())))
  }

  get waitingCount(): number {
    return this.waiters.size
  }

  /** @throws if no connection is free in time, or if none can be opened and the pool has no other */
  take(): Promise<PoolClient> {
    return new Promise((resolve, reject) => {
      const settle: Settle = (error, client) => {
        clearTimeout(timer)
        this.waiters.delete(settle)
        if (client) resolve(client)
        else reject(error)
      }
      // The error is made when it is needed: its stack costs more than all else here.
      const timer = setTimeout(() => settle(new Error('no connection was free in time')), this.timeoutMs)
      this.waiters.add(settle)
      if (this.pool.idleCount > 0 || this.pool.totalCount < this.max) this.open()
    })
  }

  release(client: PoolClient, isUsable: boolean): void {
    const isKept = isUsable && performance.now() < (this.endsAt.get(client) ?? 0)
    if (isKept) this.lend(client)
    else {
      client.release(true)
      if (this.waiters.size > 0) this.open()
    }
  }

  private open(): void {
    this.pool.connect().then(
      (client) => this.lend(client),
      (error) => {
        if (this.pool.totalCount > 0) return this.onOpenError(error)
        for (const settle of this.waiters) settle(error)
      }
    )
  }

  private lend(client: PoolClient): void {
    const [settle] = this.waiters
    if (settle) settle(undefined, client)
    else client.release()
  }
}
