import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { closeSync, openSync, readFileSync, rmSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { nodeWithoutLoader } from './run-node.js'
import { createTemporaryFolder } from './temporary-folder.js'
import { until } from './until.js'

const builtService = fileURLToPath(new URL('../dist/server.js', import.meta.url))

export interface ServerProcessOptions {
  /** The whole environment but PATH and a free PORT. */
  env?: Record<string, string | undefined>
  cwd?: string
  /** Matches the output when the server listens. Its first group is the URL. */
  announcement?: RegExp
  /** A file descriptor. By default a file, which `stdout` reads. */
  stdout?: number | undefined
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
    const { stdout = openSync(join(directory, 'stdout'), 'w') } = options
    const stderr = openSync(join(directory, 'stderr'), 'w')
    const child = spawn('/usr/bin/env', nodeWithoutLoader(args, env), {
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
}
