import { execFileSync } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { chownSync, existsSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { mkdir, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import type pg from 'pg'
import { migrate } from '#src/stores/migrations.js'
import { freePort } from '../../dev/embedded-stores.js'
import { GuardedServer, isRoot, unprivileged, unprivilegedId } from '../../dev/guarded-server.js'
import { postmasterPid, queryOnce } from '../../testkit/postgres-admin.js'
import { createTemporaryFolder } from '../../testkit/temporary-folder.js'

/** Enough for the 50 connections of a test, each of which is a connection to every worker, too. */
const commonSettings = ['listen_addresses=127.0.0.1', 'unix_socket_directories=', 'max_connections=300']

const citusSettings = [
  'shared_preload_libraries=citus',
  // Otherwise packaged builds send reports to their maker.
  'citus.enable_statistics_collection=off',
  // By default nodes talk over TLS and call themselves localhost.
  'citus.node_conninfo=sslmode=disable',
  'citus.local_hostname=127.0.0.1'
]

/** A Postgres on loopback, as a node of a cluster or for itself. */
export class Node {
  private server: GuardedServer | undefined

  private constructor(
    readonly name: string,
    readonly port: number,
    private readonly command: string[],
    private readonly directory: string,
    private readonly secret: string
  ) {}

  /**
   * Initializes and starts a node.
   *
   * @param programs the folder of initdb and postgres
   * @param directory of the cluster, with the file `secret`
   */
  static async start(programs: string, directory: string, name: string, settings: string[]): Promise<Node> {
    const [data, port] = [join(directory, name), await freePort()]
    await mkdir(data, { mode: 0o700 })
    if (isRoot) chownSync(data, unprivilegedId, unprivilegedId)
    const secretFile = join(directory, 'secret')
    run([join(programs, 'initdb'), '-D', data, '-U', 'postgres', '-A', 'scram-sha-256', `--pwfile=${secretFile}`])
    const options = [...commonSettings, `port=${port}`, ...settings].flatMap((setting) => ['-c', setting])
    const command = [join(programs, 'postgres'), '-D', data, ...options]
    const node = new Node(name, port, command, directory, readFileSync(secretFile, 'utf8'))
    await node.start()
    return node
  }

  get url(): string {
    return `postgresql://postgres:${this.secret}@127.0.0.1:${this.port}/postgres`
  }

  async start(): Promise<void> {
    const logFile = join(this.directory, `${this.name}.log`)
    this.server = GuardedServer.spawn(this.name, unprivileged(this.command), logFile)
    await this.server.untilReady(() => this.query('SELECT 1'))
  }

  async stop(): Promise<void> {
    this.signal('SIGCONT')
    await this.server?.stop()
  }

  query<Row extends pg.QueryResultRow>(text: string, values: unknown[] = []): Promise<Row[]> {
    return queryOnce<Row>(this.url, text, values)
  }

  /** Signals all processes, as if the machine crashed (SIGKILL) or hung (SIGSTOP). */
  signal(signal: NodeJS.Signals): void {
    for (const pid of this.processes()) {
      try {
        process.kill(pid, signal)
      } catch {
        // It has ended since.
      }
    }
  }

  /** Returns the process ids, that of the parent first, so that it starts no others. */
  private processes(): number[] {
    const data = join(this.directory, this.name)
    if (!existsSync(join(data, 'postmaster.pid'))) return []
    const parent = postmasterPid(data)
    const children = readdirSync('/proc')
      .map(Number)
      .filter((pid) => pid > 0 && parentOf(pid) === parent)
    return [parent, ...children]
  }
}

/** Returns the parent of a process, or undefined if it has ended. */
function parentOf(pid: number): number | undefined {
  try {
    return Number(/^PPid:\s+(\d+)/m.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1])
  } catch {
    return undefined
  }
}

/** Runs a program that refuses to run as root. */
function run(args: string[]): void {
  const { command, identity } = unprivileged(args)
  const [program = '', ...rest] = command
  execFileSync(program, rest, { ...identity, stdio: ['ignore', 'ignore', 'inherit'] })
}

/** A coordinator and two workers with the table of the service, and a plain Postgres of the same version. */
export interface Cluster {
  readonly coordinator: Node
  readonly workers: readonly [Node, Node]
  readonly plain: Node
  stop(): Promise<void>
}

/** @param programs the folder of the programs of a Postgres in which Citus is installed */
export async function startCluster(programs: string): Promise<Cluster> {
  const directory = createTemporaryFolder()
  const nodes: Node[] = []
  async function stop(): Promise<void> {
    await Promise.all(nodes.map((node) => node.stop()))
    await rm(directory, { recursive: true })
  }
  async function startNode(name: string, settings: string[]): Promise<Node> {
    const node = await Node.start(programs, directory, name, settings)
    nodes.push(node)
    return node
  }
  try {
    createSecret(directory)
    const coordinator = await startNode('coordinator', citusSettings)
    const workers = [await startNode('worker-1', citusSettings), await startNode('worker-2', citusSettings)] as const
    for (const node of [coordinator, ...workers]) await node.query('CREATE EXTENSION citus')
    await coordinator.query(`SELECT citus_set_coordinator_host('127.0.0.1', $1)`, [coordinator.port])
    for (const { port } of workers) await coordinator.query(`SELECT citus_add_node('127.0.0.1', $1)`, [port])
    await migrate(coordinator.url)
    const sql = fileURLToPath(new URL('../../deploy/citus.sql', import.meta.url))
    const psql = [coordinator.url, '-X', '-q', '-v', 'ON_ERROR_STOP=1', '-f', sql]
    execFileSync(join(programs, 'psql'), psql, { stdio: ['ignore', 'ignore', 'inherit'] })

    const plain = await startNode('plain', [])
    await migrate(plain.url)
    return { coordinator, workers, plain, stop }
  } catch (error) {
    await stop()
    throw error
  }
}

/** Creates the password of all nodes. They find it in a password file when they connect to each other. */
function createSecret(directory: string): void {
  const secret = randomBytes(32).toString('hex')
  const passwordFile = join(directory, 'pgpass')
  writeFileSync(join(directory, 'secret'), secret, { mode: 0o600 })
  writeFileSync(passwordFile, `*:*:*:*:${secret}\n`, { mode: 0o600 })
  if (isRoot) chownSync(passwordFile, unprivilegedId, unprivilegedId)
  process.env.PGPASSFILE = passwordFile
}
