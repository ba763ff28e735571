import { setTimeout as sleep } from 'node:timers/promises'
import { ServerProcess } from '../../testkit/server-process.js'

/** A start fails if a store is away for longer than the service waits for it. */
const startAttempts = 4

/** An instance of the built service that can be killed and started again. */
export class ServiceInstance {
  /** Undefined while the instance does not run. */
  url: string | undefined
  private process: ServerProcess | undefined

  constructor(private readonly env: Record<string, string>) {}

  async start(): Promise<void> {
    for (let attempt = 1; this.url === undefined; attempt++) {
      this.process = ServerProcess.start(undefined, { env: this.env })
      try {
        this.url = await this.process.url()
      } catch (error) {
        this.process.dispose()
        if (attempt === startAttempts) throw error
      }
    }
  }

  async kill(): Promise<void> {
    this.url = undefined
    this.process?.kill('SIGKILL')
    await this.process?.exit
    this.process?.dispose()
  }

  /** Stops the process for a while, without ending it. Its leases may expire meanwhile. */
  async pause(ms: number): Promise<void> {
    this.process?.kill('SIGSTOP')
    await sleep(ms)
    this.process?.kill('SIGCONT')
  }

  /** Ends it with SIGTERM. @returns why it did not exit with 0, or undefined */
  async stop(): Promise<string | undefined> {
    const exitCode = await this.process?.stop()
    const failure = exitCode === 0 ? undefined : `exit code ${exitCode} ${this.process?.stderr}`
    this.process?.dispose()
    return failure
  }
}
