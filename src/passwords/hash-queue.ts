import type { Writable } from 'node:stream'

/** How many of the last jobs count in the moving average of job times, approximately. */
const averagedJobs = 10

/** A new job would wait longer than it may, or the queue is closed. */
export class QueueFull extends Error {
  override readonly name = 'QueueFull'
  readonly code = 'QUEUE_FULL'

  constructor(readonly retryAfterSeconds: number) {
    super('the hash queue is full')
  }
}

/** The client disconnected while its job waited. */
export class ClientDisconnected extends Error {
  override readonly name = 'ClientDisconnected'
  readonly code = 'CLIENT_DISCONNECTED'

  constructor() {
    super('the client disconnected')
  }
}

/**
 * A queue in front of libuv's thread pool, first come, first served. A job that the pool has cannot leave it any more, so
 * the pool gets few at a time.
 */
export class HashQueue {
  /** Functions that start the waiting jobs, in order of arrival. A set, because a job can leave from any position. */
  private readonly waiting = new Set<() => void>()
  /** The responses of requests that have been admitted and have not joined the queue yet. */
  private readonly admitted = new Set<Writable>()
  private runningCount = 0
  private finishedCount = 0
  private averageJobMs = 0
  private isClosed = false

  /** Called after each job with the time that it has waited, and its time in the pool. */
  onJob: ((waitMs: number, durationMs: number) => void) | undefined

  /**
   * @param poolJobs how many jobs libuv's pool has at a time
   * @param maxWaitMs the longest expected wait with which a request is admitted
   */
  constructor(
    private readonly poolJobs: number,
    private readonly maxWaitMs: number
  ) {}

  /** The number of jobs that wait for their turn. */
  get queueLength(): number {
    return this.waiting.size
  }

  /**
   * How long a new job would wait. Admitted requests count as if they had joined the queue: while Redis takes 800 ms for an
   * answer, hundreds arrive, and the queue is empty until all of them join it.
   */
  get expectedWaitMs(): number {
    const jobCount = this.runningCount + this.waiting.size + this.admitted.size
    return (Math.max(0, jobCount - this.poolJobs) * this.averageJobMs) / this.poolJobs
  }

  /**
   * Admits a request. One that has been admitted before is checked again, without its own place.
   *
   * @param response has a place in the queue until it runs a job or {@link release} is called
   * @throws {QueueFull} if a new job would wait longer than it may
   */
  admit(response?: Writable): void {
    if (response) this.release(response)
    const excessMs = this.expectedWaitMs - this.maxWaitMs
    if (this.isClosed || excessMs > 0) throw new QueueFull(Math.max(1, Math.ceil(excessMs / 1_000)))
    if (response) this.admitted.add(response)
  }

  /** Ends the admission of a request that has run no job. */
  release(response: Writable): void {
    this.admitted.delete(response)
  }

  /**
   * Runs a job when it is its turn. A job may join a queue of any length, because its request may hold a code.
   *
   * @param response removes the job from the queue when it closes; a running job is finished
   * @throws {ClientDisconnected}
   * @throws {QueueFull} if the queue is closed
   */
  async run<T>(job: () => Promise<T>, response?: Writable): Promise<T> {
    if (response) this.release(response)
    if (this.isClosed) throw new QueueFull(1)
    if (response?.closed) throw new ClientDisconnected()
    const joinedAt = performance.now()
    await this.takeTurn(response)
    const startedAt = performance.now()
    try {
      const result = await job()
      const durationMs = performance.now() - startedAt
      this.averageJobMs += (durationMs - this.averageJobMs) / Math.min(++this.finishedCount, averagedJobs)
      this.onJob?.(startedAt - joinedAt, durationMs)
      return result
    } finally {
      this.passTurnOn()
    }
  }

  /** Resolves when all jobs have ended. Later ones are refused. */
  async close(): Promise<void> {
    this.isClosed = true
    await Promise.all(Array.from({ length: this.poolJobs }, () => this.takeTurn()))
  }

  /** Resolves when it is the caller's turn. */
  private takeTurn(response?: Writable): Promise<void> {
    if (this.runningCount < this.poolJobs) {
      this.runningCount++
      return Promise.resolve()
    }
    return new Promise((resolve, reject) => {
      this.waiting.add(resolve)
      response?.once('close', () => {
        if (this.waiting.delete(resolve)) reject(new ClientDisconnected())
      })
    })
  }

  private passTurnOn(): void {
    const [start] = this.waiting
    if (start === undefined) this.runningCount--
    else {
      this.waiting.delete(start)
      start()
    }
  }
}
