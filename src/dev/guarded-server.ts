import { type ChildProcess, spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { open, readFile } from 'node:fs/promises'
import { setTimeout as sleep } from 'node:timers/promises'

/**
 * Runs its arguments as a server until standard input ends, and then interrupts it. The input is a pipe from this
 * process and ends with it, even after a SIGKILL, so no server is ever left behind.
 */
const guard = `
  exec 3<&0
  "$@" </dev/null 3<&- &
  server=$!
  { read -r _ <&3; kill -INT "$server"; } 2>/dev/null &
  wait "$server"
`

/** `nobody` on every Linux. */
export const unprivilegedId = 65_534

/** How long a server may take to start (Postgres may have to recover) and to end. */
const patienceMs = 30_000

/**
 * The prefix of a command that runs it as nobody. Postgres refuses to run as root; but nobody could not look into a
 * folder of root's, such as /root, so the process keeps that one capability.
 */
function asNobody(): string[] {
  const setpriv = [
    'setpriv',
    `--reuid=${unprivilegedId}`,
    `--regid=${unprivilegedId}`,
    '--clear-groups',
    '--inh-caps=+dac_read_search',
    '--ambient-caps=+dac_read_search',
    // access(2) looks at capabilities only with this.
    '--securebits=+no_setuid_fixup'
  ]
  return spawnSync('setpriv', [...setpriv.slice(1), 'true']).status === 0 ? setpriv : []
}

export const isRoot = process.getuid?.() === 0

/** How to run a command that refuses to be root. */
export function unprivileged(command: string[]): { command: string[]; identity: { uid?: number; gid?: number } } {
  if (!isRoot) return { command, identity: {} }
  const prefix = asNobody()
  const identity = prefix.length > 0 ? {} : { uid: unprivilegedId, gid: unprivilegedId }
  return { command: [...prefix, ...command], identity }
}

/** A server of another program, which ends when this process does. */
export class GuardedServer {
  private constructor(
    private readonly name: string,
    private readonly process: ChildProcess,
    private readonly logFile: string
  ) {}

  /**
   * @param answers resolves once the server answers, rejects as long as it does not
   * @throws {Error} with the last words of the server's log, if it ends or does not answer in time
   */
  static async start(
    name: string,
    server: ReturnType<typeof unprivileged>,
    logFile: string,
    answers: () => Promise<unknown>
  ): Promise<GuardedServer> {
    const log = await open(logFile, 'a')
    const child = spawn('/bin/sh', ['-c', guard, name, ...server.command], {
      // Its own process group: an interrupt from the terminal is for the service, which ends its servers itself, last.
      detached: true,
      stdio: ['pipe', log.fd, log.fd],
      env: { ...process.env, LC_ALL: 'C' },
      ...server.identity
    })
    await log.close()
    const guarded = new GuardedServer(name, child, logFile)
    child.once('exit', () => child.stdin?.destroy())
    await guarded.ready(answers)
    return guarded
  }

  private async ready(answers: () => Promise<unknown>): Promise<void> {
    const deadline = Date.now() + patienceMs
    for (;;) {
      try {
        await answers()
        return
      } catch (cause) {
        if (this.process.exitCode === null && Date.now() < deadline) {
          await sleep(20)
          continue
        }
        await this.stop()
        const lines = (await readFile(this.logFile, 'utf8')).trimEnd().split('\n')
        const lastWords = lines.findLast((line) => /FATAL|error/i.test(line)) ?? lines.at(-1)
        throw new Error(`the private ${this.name} did not start: ${lastWords} (${this.logFile})`, { cause })
      }
    }
  }

  async stop(): Promise<void> {
    if (this.process.exitCode !== null || this.process.signalCode !== null) return
    const ended = once(this.process, 'exit')
    this.process.stdin?.end()
    await Promise.race([ended, sleep(patienceMs, undefined, { ref: false })])
  }
}
