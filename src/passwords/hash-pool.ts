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
  queuedAt: number
  resolve(result: string | boolean): void
  reject(error: unknown): void
}

interface Thread {
  worker: Worker
  /** The job of the thread, or undefined while it is idle. */
  current: (QueuedJob & { startedAt: number }) | undefined
}

/** The message of a thread after a job. */
type ThreadReply = { result: string | boolean } | { error: unknown }

/** Weight of the newest job in the moving average of job times: about the last ten jobs count. */
const newestJobWeight = 0.1

/** How many steps of nice(2) the threads' priority is below the event loop's. Only Linux has it per thread. */
const niceness = 10

/** The client disconnected while its job waited. The outcome is for a pipelined request that may still be answered. */
export class ClientGone extends Refusal {
  constructor() {
    super('busy')
  }
}

/** argon2id in threads, strictly first come, first served. */
export class HashPool {
  private readonly threads: Thread[] = []
  /** In order of arrival. A set, because a job can leave from any position. */
  private readonly queue = new Set<QueuedJob>()
  private readonly jobs = new InFlight()
  private averageJobMs = 0
  private isClosed = false

  /** Called after each job with its time in the queue and in the thread. */
  onJob: ((waitMs: number, durationMs: number) => void) | undefined

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
   * @throws if no hash can be created with the parameters
   */
  async ready(): Promise<void> {
    const hashInEachThread = () => Promise.all(this.threads.map(() => this.hash('warm-up')))
    await hashInEachThread()
    // The first job of a thread includes its start, so it does not count.
    this.averageJobMs = 0
    await hashInEachThread()
  }

  /** The number of jobs that wait. */
  get queueLength(): number {
    return this.queue.size
  }

  /** How long a new job would wait: queue length × average job time ÷ threads. */
  get expectedWaitMs(): number {
    return (this.queue.size * this.averageJobMs) / this.threads.length
  }

  /**
   * @param client removes the job from the queue when it closes; a job that has started is finished
   * @returns a PHC string
   * @throws {ClientGone}
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
    await this.jobs.drain()
    this.isClosed = true
    await Promise.all(this.threads.map(({ worker }) => worker.terminate()))
  }

  private run(job: HashJob, client?: Writable): Promise<string | boolean> {
    const result = new Promise<string | boolean>((resolve, reject) => {
      if (this.isClosed) throw new Refusal('busy')
      if (client?.closed) throw new ClientGone()
      const queued: QueuedJob = { job, queuedAt: performance.now(), resolve, reject }
      this.queue.add(queued)
      client?.once('close', () => {
        if (this.queue.delete(queued)) reject(new ClientGone())
      })
      const idleThread = this.threads.find(({ current }) => current === undefined)
      if (idleThread) this.startNextJob(idleThread)
    })
    return this.jobs.track(result)
  }

  private startNextJob(thread: Thread): void {
    const [next] = this.queue
    if (next === undefined) return
    this.queue.delete(next)
    thread.current = { ...next, startedAt: performance.now() }
    thread.worker.postMessage(next.job)
  }

  private startThread(): Thread {
    const worker = new Worker(new URL('./hash-thread.js', import.meta.url), {
      workerData: { parameters: this.parameters, niceness },
      // The threads need neither options nor an environment. With NODE_OPTIONS each of them would load what it preloads, such
      // as the hooks of a test runner: a third of a second of CPU time.
      execArgv: [],
      env: {}
    })
    const thread: Thread = { worker, current: undefined }
    this.threads.push(thread)

    worker.on('message', (reply: ThreadReply) => {
      const { current } = thread
      thread.current = undefined
      this.startNextJob(thread)
      if (current === undefined) return
      const durationMs = performance.now() - current.startedAt
      this.averageJobMs += (durationMs - this.averageJobMs) * (this.averageJobMs === 0 ? 1 : newestJobWeight)
      this.onJob?.(current.startedAt - current.queuedAt, durationMs)
      if ('result' in reply) current.resolve(reply.result)
      else current.reject(reply.error)
    })
    // A thread that fails, for example without memory, is replaced.
    worker.on('error', (error) => thread.current?.reject(error))
    worker.on('exit', () => {
      this.threads.splice(this.threads.indexOf(thread), 1)
      if (!this.isClosed) this.startNextJob(this.startThread())
    })
    return thread
  }
}
