import type { Writable } from 'node:stream'
import { Worker } from 'node:worker_threads'
import type { Options } from '@node-rs/argon2'
import { Unsettled } from '../http/in-flight.js'
import { Refusal } from '../outcomes.js'

/** A password to hash or, with a PHC string, to verify against it. */
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
  /** What it works on; undefined while it is idle. */
  current: (QueuedJob & { startedAt: number }) | undefined
}

/** What a thread answers. */
type Answer = { result: string | boolean } | { error: unknown }

/** The weight of the newest job in the average time of a job: roughly the last ten count. */
const newestWeight = 0.1

/** How much lower than the event loop's the threads' priority is, on Linux, in steps of nice(2). */
const niceness = 10

/** Nobody waits for the job any more, and it has not begun. As an outcome for whoever may still listen: ask again. */
export class ClientGone extends Refusal {
  constructor() {
    super('busy')
  }
}

/**
 * argon2id in threads of their own, strictly first come, first served.
 */
export class HashPool {
  private readonly threads: Thread[] = []
  /** In order of arrival; a set, so that a job can leave from anywhere. */
  private readonly waiting = new Set<QueuedJob>()
  private readonly jobs = new Unsettled()
  private averageJobMs = 0
  private closed = false

  /**
   * @param parameters of the hashes that it makes; those that it verifies bring their own
   * @param observe is told of each job how long it waited and worked
   */
  constructor(
    size: number,
    private readonly parameters: Options,
    private readonly observe?: (waitMs: number, jobMs: number) => void
  ) {
    while (this.threads.length < size) this.startThread()
  }

  /** Waits until every thread has made a hash: the settings work, and the time of a job is known. */
  async ready(): Promise<void> {
    const warmUp = () => Promise.all(this.threads.map(() => this.hash('warm-up')))
    await warmUp()
    // The first job of a thread waits until it has loaded, which says nothing of the next.
    this.averageJobMs = 0
    await warmUp()
  }

  /** The jobs that wait. */
  get queueLength(): number {
    return this.waiting.size
  }

  /** How long a job would wait that came now: the work queued × the time of a job ÷ the threads. */
  get expectedWaitMs(): number {
    return (this.waiting.size * this.averageJobMs) / this.threads.length
  }

  /**
   * @param client takes the job out of the queue when it closes; once a thread works on it, it is finished
   * @returns a PHC string
   * @throws {ClientGone}
   */
  hash(password: string, client?: Writable): Promise<string> {
    return this.run({ password }, client).then(String)
  }

  /** As hash(). */
  verify(phc: string, password: string, client?: Writable): Promise<boolean> {
    return this.run({ password, phc }, client).then((matches) => matches === true)
  }

  /** Finishes the queue and ends the threads. */
  async close(): Promise<void> {
    await this.jobs.none()
    this.closed = true
    await Promise.all(this.threads.map(({ worker }) => worker.terminate()))
  }

  private run(job: HashJob, client?: Writable): Promise<string | boolean> {
    const promise = new Promise<string | boolean>((resolve, reject) => {
      if (this.closed) throw new Refusal('busy')
      if (client?.closed) throw new ClientGone()
      const queued: QueuedJob = { job, queuedAt: performance.now(), resolve, reject }
      this.waiting.add(queued)
      client?.once('close', () => {
        if (this.waiting.delete(queued)) reject(new ClientGone())
      })
      const idle = this.threads.find(({ current }) => current === undefined)
      if (idle) this.giveNext(idle)
    })
    return this.jobs.add(promise)
  }

  private giveNext(thread: Thread): void {
    const [next] = this.waiting
    if (next === undefined) return
    this.waiting.delete(next)
    thread.current = { ...next, startedAt: performance.now() }
    thread.worker.postMessage(next.job)
  }

  private startThread(): Thread {
    const worker = new Worker(new URL('./hash-thread.js', import.meta.url), {
      workerData: { parameters: this.parameters, niceness },
      execArgv: []
    })
    const thread: Thread = { worker, current: undefined }
    this.threads.push(thread)

    worker.on('message', (answer: Answer) => {
      const { current } = thread
      thread.current = undefined
      this.giveNext(thread)
      if (current === undefined) return
      const jobMs = performance.now() - current.startedAt
      this.averageJobMs += (jobMs - this.averageJobMs) * (this.averageJobMs === 0 ? 1 : newestWeight)
      this.observe?.(current.startedAt - current.queuedAt, jobMs)
      if ('result' in answer) current.resolve(answer.result)
      else current.reject(answer.error)
    })
    // A thread that fails, as for want of memory, is replaced.
    worker.on('error', (error) => thread.current?.reject(error))
    worker.on('exit', () => {
      this.threads.splice(this.threads.indexOf(thread), 1)
      if (!this.closed) this.giveNext(this.startThread())
    })
    return thread
  }
}
