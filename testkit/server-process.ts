import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { closeSync, openSync, readFileSync, rmSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { createTemporaryFolder } from './temporary-folder.js'
import { until } from './until.js'

/** The unit of the CPU times in /proc, on every Linux. */
const ticksPerSecond = 100

const builtService = fileURLToPath(new URL('../dist/server.js', import.meta.url))

export interface ServerProcessOptions {
  /** The whole environment but PATH and a free PORT. */
  env?: Record<string, string | undefined>
  cwd?: string
  /** Matches the output when the server listens. Its first group is the URL. */
  announcement?: RegExp
}

/** A server in a process of its own. Its output goes to files, so that reading it costs nothing during a measurement. */
export class ServerProcess {
  readonly exit: Promise<unknown[]>

  private constructor(
    readonly child: ChildProcess,
    private readonly directory: string,
    private readonly announcement: RegExp
  ) {
    this.exit = once(child, 'exit')
    // If this process throws before it stops the server.
    process.once('exit', this.dispose)
  }

  /** @param args of `node`; by default the built service */
  static start(args: string[] = [builtService], options: ServerProcessOptions = {}): ServerProcess {
    const { env, cwd, announcement = /Server listening at (http:[^"]+)/ } = options
    const directory = createTemporaryFolder()
    const [stdout, stderr] = [openSync(join(directory, 'stdout'), 'w'), openSync(join(directory, 'stderr'), 'w')]
    const child = spawn(process.execPath, args, {
      cwd,
      env: { PATH: process.env.PATH, PORT: '0', ...env },
      stdio: ['ignore', stdout, stderr]
    })
    for (const file of [stdout, stderr]) closeSync(file)
    return new ServerProcess(child, directory, announcement)
  }

  get stdout(): string {
    return readFileSync(join(this.directory, 'stdout'), 'utf8')
  }

  get stderr(): string {
    return readFileSync(join(this.directory, 'stderr'), 'utf8')
  }

  get hasExited(): boolean {
    return this.child.exitCode !== null || this.child.signalCode !== null
  }

  /** Waits for a text on standard output. @throws if the process ends before */
  async waitFor(text: RegExp): Promise<RegExpExecArray> {
    let found: RegExpExecArray | null = null
    await until(`the process prints ${text}`, () => {
      const { hasExited } = this
      found = text.exec(this.stdout)
      return found !== null || hasExited
    })
    if (found === null) throw new Error(`ended before it printed ${text}: ${this.stdout}${this.stderr}`)
    return found
  }

  /** Waits until the server listens, and returns its URL. */
  async url(): Promise<string> {
    return (await this.waitFor(this.announcement))[1] ?? ''
  }

  kill(signal: NodeJS.Signals): void {
    this.child.kill(signal)
  }

  /** Ends it with SIGTERM. @returns the exit code */
  async stop(): Promise<number | null> {
    this.kill('SIGTERM')
    await this.exit
    return this.child.exitCode
  }

  /** Kills it and deletes its output. */
  readonly dispose = (): void => {
    process.off('exit', this.dispose)
    this.kill('SIGKILL')
    rmSync(this.directory, { recursive: true, force: true })
  }

  /** Returns the CPU time of all its threads, in milliseconds. */
  cpuMs(): number {
    // The name may contain spaces. After it, state is field 3, utime 14 and stime 15 (proc(5)).
    const fields = readFileSync(`/proc/${this.child.pid}/stat`, 'utf8').split(') ')[1]?.split(' ') ?? []
    return ((Number(fields[11]) + Number(fields[12])) * 1_000) / ticksPerSecond
  }

  /** Returns the CPU time of its main thread, which runs the event loop, in milliseconds. */
  mainThreadMs(): number {
    const { pid } = this.child
    // The first field is the time on a CPU in nanoseconds (Documentation/scheduler/sched-stats.rst of Linux).
    return Number(readFileSync(`/proc/${pid}/task/${pid}/schedstat`, 'utf8').split(' ')[0]) / 1e6
  }

  /** Returns its resident memory, in MiB. */
  residentMib(): number {
    const [, kib] = /^VmRSS:\s+(\d+)/m.exec(readFileSync(`/proc/${this.child.pid}/status`, 'utf8')) ?? []
    return Number(kib) / 1_024
  }
}
