import { once } from 'node:events'
import type { Writable } from 'node:stream'
import { Worker } from 'node:worker_threads'
import type { Options } from '@node-rs/argon2'
import { InFlight } from '../http/in-flight.js'
import { Refusal } from '../outcomes.js'

/** A password to hash or, with a PHC string, to verify. */
export interface HashJob {
  password: string
  phc?: string
}

interface QueuedJob {
  job: HashJob
  client: Writable | undefined
  /** By {@link nowMs}. */
  queuedAt: number
  resolve(result: string | boolean): void
  reject(error: unknown): void
}

interface Thread {
  worker: Worker
  /** Resolves when it has started. */
  started: Promise<unknown>
  /** Whether it has started, and so takes jobs. */
  isReady: boolean
  /** The jobs that it has in hand: the one that it computes, and the next, which waits in its port. */
  jobs: QueuedJob[]
  /** When it has begun the first of its jobs, by {@link nowMs}. */
  startedAt: number
  /** Why it ends. */
  error?: unknown
}

/** The message of a thread when it has started, and after each job. The times are in ms by the clock of `nowMs`. */
type ThreadMessage =
  | 'ready'
  | (({ result: string | boolean } | { error: unknown }) & { startedAt: number; endedAt: number })

/**
 * How many jobs a thread may have in hand. With one it would be idle after each job until the event loop gives it another. A
 * job in hand does not leave when its client disconnects, so not more than two.
 */
const jobsInHandMax = 2

/** The first pause before a thread that could not start is started again. It doubles up to the longest. */
const firstRestartPauseMs = 100
export const longestRestartPauseMs = 5_000

/** Weight of the newest job in the moving average of job times: about the last ten jobs count. */
const newestJobWeight = 0.1

/** How many steps of nice(2) the threads' priority is below the event loop's. Only Linux has it per thread. */
const niceness = 10

/** The client disconnected while its job waited. `busy` is in the log and the metrics: nobody receives the reply. */
export class ClientDisconnected extends Refusal {
  constructor() {
    super('busy')
  }
}

/** The monotonic clock that all threads of the process share, in ms. The zero of `performance.now()` differs in each thread. */
const nowMs = () => Number(process.hrtime.bigint()) / 1e6

/** No thread can start. */
const unavailable = () => new Refusal('busy', undefined, { retryAfterSeconds: longestRestartPauseMs / 1_000 })

/** argon2id in threads, first come, first served. */
export class HashPool {
  private readonly threads: Thread[] = []
  /** The jobs that no thread has in hand, in order of arrival. A set, because a job can leave from any position. */
  private queue = new Set<QueuedJob>()
  private readonly inFlight = new InFlight()
  private averageJobMs = 0
  private restartPauseMs = firstRestartPauseMs
  private isClosed = false
  /** False from the failure of the last thread until one has started. */
  isAvailable = true

  /** Called after each job with the time that it has waited, and its time in the thread. */
  onJob: ((waitMs: number, durationMs: number) => void) | undefined
  /** Called when a job has joined the queue, because every thread has as many jobs in hand as it takes. */
  onBacklog: (() => void) | undefined
  /** Called when a thread has failed. */
  onThreadError: ((error: unknown) => void) | undefined

  /** @param parameters of the hashes that it creates; a PHC string brings its own */
  constructor(
    size: number,
    private readonly parameters: Options
  ) {
    while (this.threads.length < size) this.startThread()
  }

  /**
   * Waits until every thread has hashed, so that the time of a job is known.
   *
   * @throws if a thread cannot start, or no hash can be created with the parameters
   */
  async ready(): Promise<void> {
    await Promise.all(this.threads.map(({ started }) => started))
    const hashInEachThread = () => Promise.all(this.threads.map(() => this.hash('warm-up')))
    await hashInEachThread()
    // The first job of a thread includes its start, so it does not count.
    this.averageJobMs = 0
    await hashInEachThread()
  }

  /** The number of jobs that wait for a thread. */
  get queueLength(): number {
    return this.threads.reduce((waiting, { jobs }) => waiting + Math.max(0, jobs.length - 1), this.queue.size)
  }

  /** How long a new job would wait: queue length × average job time ÷ threads. */
  get expectedWaitMs(): number {
    return (this.queueLength * this.averageJobMs) / Math.max(1, this.threads.length)
  }

  /**
   * How long no thread needs the event loop, in milliseconds. While the queue has a job for each thread, each thread also has
   * its next one in hand. Else 0: the queue may be empty after a sleep.
   */
  get slackMs(): number {
    const ready = this.threads.filter(({ isReady }) => isReady).length
    return ready > 0 && this.queue.size >= ready ? this.averageJobMs : 0
  }

  /**
   * @param client removes the job from the queue when it closes; a job that a thread has in hand is finished
   * @returns a PHC string
   * @throws {ClientDisconnected}
   */
  hash(password: string, client?: Writable): Promise<string> {
    return this.run({ password }, client).then(String)
  }

  /** Verifies in the same queue. For `client` and errors see {@link hash}. */
  verify(phc: string, password: string, client?: Writable): Promise<boolean> {
    return this.run({ password, phc }, client).then((matches) => matches === true)
  }

  /** Finishes all jobs and ends the threads. */
  async close(): Promise<void> {
    await this.inFlight.drain()
    this.isClosed = true
    await Promise.all(this.threads.map(({ worker }) => worker.terminate()))
  }

  private run(job: HashJob, client?: Writable): Promise<string | boolean> {
    const result = new Promise<string | boolean>((resolve, reject) => {
      if (this.isClosed) throw new Refusal('busy')
      if (!this.isAvailable) throw unavailable()
      if (client?.closed) throw new ClientDisconnected()
      const queued: QueuedJob = { job, client, queuedAt: nowMs(), resolve, reject }
      this.queue.add(queued)
      client?.once('close', () => this.leave(queued))
      this.dispatch()
      if (this.queue.has(queued)) this.onBacklog?.()
    })
    return this.inFlight.track(result)
  }

  /** The client of a job has disconnected. The job leaves the queue, unless a thread has it in hand. */
  private leave(job: QueuedJob): void {
    if (this.queue.delete(job)) job.reject(new ClientDisconnected())
  }

  /** Gives the threads the next jobs of the queue. */
  private dispatch(): void {
    for (const next of this.queue) {
      const thread = this.nextThread()
      if (thread === undefined) return
      this.queue.delete(next)
      if (thread.jobs.length === 0) thread.startedAt = nowMs()
      thread.jobs.push(next)
      thread.worker.postMessage(next.job)
    }
  }

  /** Returns the thread that will begin another job first: an idle one, or the one that has begun its job first. */
  private nextThread(): Thread | undefined {
    const [first] = this.threads
      .filter(({ isReady, jobs }) => isReady && jobs.length < jobsInHandMax)
      .sort((a, b) => a.jobs.length - b.jobs.length || a.startedAt - b.startedAt)
    return first
  }

  private startThread(): void {
    const worker = new Worker(new URL('./hash-thread.js', import.meta.url), {
      workerData: { parameters: this.parameters, niceness },
      // The threads need neither options nor an environment. With NODE_OPTIONS each of them would load what it preloads, such
      // as the hooks of a test runner: a third of a second of CPU time.
      execArgv: [],
      env: {}
    })
    const thread: Thread = { worker, started: once(worker, 'message'), isReady: false, jobs: [], startedAt: 0 }
    thread.started.catch(() => undefined)
    this.threads.push(thread)

    worker.on('message', (message: ThreadMessage) => {
      if (message === 'ready') this.onReady(thread)
      else this.onResult(thread, message)
    })
    worker.on('error', (error) => {
      // The job that failed is known at 'exit': until then results of earlier jobs may arrive.
      thread.error = error
      this.onThreadError?.(error)
    })
    worker.on('exit', () => this.replace(thread))
  }

  private onReady(thread: Thread): void {
    thread.isReady = true
    this.isAvailable = true
    this.restartPauseMs = firstRestartPauseMs
    this.dispatch()
  }

  private onResult(thread: Thread, message: Exclude<ThreadMessage, 'ready'>): void {
    const job = thread.jobs.shift()
    const { startedAt, endedAt } = message
    thread.startedAt = endedAt
    this.dispatch()
    if (job === undefined) return
    const durationMs = endedAt - startedAt
    this.averageJobMs += (durationMs - this.averageJobMs) * (this.averageJobMs === 0 ? 1 : newestJobWeight)
    this.onJob?.(startedAt - job.queuedAt, durationMs)
    if ('result' in message) job.resolve(message.result)
    else job.reject(message.error)
  }

  /** A thread that fails, for example without memory, is replaced at once. One that cannot start is started again later. */
  private replace(thread: Thread): void {
    this.threads.splice(this.threads.indexOf(thread), 1)
    const [current, ...next] = thread.jobs
    current?.reject(thread.error ?? new Error('the hash thread has ended'))
    if (this.isClosed) return
    this.queue = new Set([...next, ...this.queue])
    for (const job of next) if (job.client?.closed) this.leave(job)
    this.dispatch()
    if (thread.isReady) this.restartThread()
    else this.startThreadLater()
  }

  /** Starts a thread after a pause, because one could not start. If there is no other, nothing can be hashed meanwhile. */
  private startThreadLater(): void {
    if (this.threads.every(({ isReady }) => !isReady)) {
      this.isAvailable = false
      for (const job of this.queue) job.reject(unavailable())
      this.queue.clear()
    }
    setTimeout(() => this.restartThread(), this.restartPauseMs).unref()
    this.restartPauseMs = Math.min(2 * this.restartPauseMs, longestRestartPauseMs)
  }

  private restartThread(): void {
    if (this.isClosed) return
    try {
      this.startThread()
    } catch (error) {
      // The operating system refuses a thread, for example because of `ulimit -u`.
      this.onThreadError?.(error)
      this.startThreadLater()
    }
  }
}
