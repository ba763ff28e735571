import { type ChildProcess, spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { closeSync, openSync } from 'node:fs'
import { readFile } from 'node:fs/promises'
import { setTimeout as sleep } from 'node:timers/promises'

/**
 * Becomes the server that its arguments name. A second process interrupts it when standard input ends. The input is a pipe
 * from this process, which ends even with SIGKILL, so no server is left behind.
 *
 * The server must not be the background process: a shell lets those ignore SIGINT until they have their own handler.
 */
const guardScript = `
  exec 3<&0
  { read -r _ <&3; kill -INT $$; } 2>/dev/null &
  exec "$@" </dev/null 3<&-
`

/** The uid and gid of `nobody` on every Linux. */
export const unprivilegedId = 65_534

/** How long a server may take to start (Postgres may have to recover) and to stop. */
const serverTimeoutMs = 30_000

const readyCheckIntervalMs = 20

/**
 * Returns the prefix of a command that runs as nobody. Postgres refuses to run as root, but nobody cannot read a folder such
 * as /root. So the process keeps the capability to read any folder.
 */
function asNobody(): string[] {
  const setpriv = [
    'setpriv',
    `--reuid=${unprivilegedId}`,
    `--regid=${unprivilegedId}`,
    '--clear-groups',
    '--inh-caps=+dac_read_search',
    '--ambient-caps=+dac_read_search',
    // Without it access(2) ignores the capability.
    '--securebits=+no_setuid_fixup'
  ]
  return spawnSync('setpriv', [...setpriv.slice(1), 'true']).status === 0 ? setpriv : []
}

export const isRoot = process.getuid?.() === 0

/** A command, and as whom to run it. */
export interface ServerCommand {
  command: string[]
  identity: { uid?: number; gid?: number }
}

/** Returns how to run a command that refuses to run as root. */
export function unprivileged(command: string[]): ServerCommand {
  if (!isRoot) return { command, identity: {} }
  const prefix = asNobody()
  const identity = prefix.length > 0 ? {} : { uid: unprivilegedId, gid: unprivilegedId }
  return { command: [...prefix, ...command], identity }
}

/** A server process that ends with this process. */
export class GuardedServer {
  private constructor(
    private readonly name: string,
    private readonly process: ChildProcess,
    private readonly logFile: string
  ) {}

  static spawn(name: string, { command, identity }: ServerCommand, logFile: string): GuardedServer {
    const log = openSync(logFile, 'a')
    const child = spawn('/bin/sh', ['-c', guardScript, name, ...command], {
      // A process group of its own: Ctrl-C in the terminal is for the service, which stops its servers last.
      detached: true,
      stdio: ['pipe', log, log],
      env: { ...process.env, LC_ALL: 'C' },
      ...identity
    })
    closeSync(log)
    child.once('exit', () => child.stdin?.destroy())
    return new GuardedServer(name, child, logFile)
  }

  /**
   * @param connect resolves when the server answers, and rejects until then
   * @throws {Error} with the last error of the server's log, if the server ends or does not answer in time
   */
  async untilReady(connect: () => Promise<unknown>): Promise<void> {
    const deadline = Date.now() + serverTimeoutMs
    for (;;) {
      try {
        await connect()
        return
      } catch (cause) {
        if (this.process.exitCode === null && Date.now() < deadline) {
          await sleep(readyCheckIntervalMs)
          continue
        }
        await this.stop()
        throw new Error(`the private ${this.name} did not start: ${await this.lastError()} (${this.logFile})`, {
          cause
        })
      }
    }
  }

  private async lastError(): Promise<string | undefined> {
    const lines = (await readFile(this.logFile, 'utf8')).trimEnd().split('\n')
    return lines.findLast((line) => /FATAL|error/i.test(line)) ?? lines.at(-1)
  }

  async stop(): Promise<void> {
    if (this.process.exitCode !== null || this.process.signalCode !== null) return
    const exited = once(this.process, 'exit')
    this.process.stdin?.end()
    await Promise.race([exited, sleep(serverTimeoutMs, undefined, { ref: false })])
  }
}
