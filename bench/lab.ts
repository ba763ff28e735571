import { type ChildProcess, execFile, spawn } from 'node:child_process'
import { once } from 'node:events'
import { readFileSync } from 'node:fs'
import { mkdtemp, open, readFile, rm } from 'node:fs/promises'
import { createRequire } from 'node:module'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { Redis } from 'ioredis'
import pg from 'pg'
import { EmbeddedStores } from '../src/dev/stores.js'
import { migrate } from '../src/stores/migrations.js'

/** How to run a TypeScript file of this folder in a process of its own. */
const typescript = ['--import', createRequire(import.meta.url).resolve('tsx')]

/** The kernel counts CPU time in these, on every Linux. */
const ticksPerSecond = 100

/** A process under measurement, which listens at `url`. */
export class Subject {
  constructor(
    readonly url: string,
    private readonly child: ChildProcess
  ) {}

  /** The CPU time that all its threads have used, in milliseconds. */
  cpuMs(): number {
    // After the name, which may hold spaces: state is the 3rd field, utime the 14th, stime the 15th (proc(5)).
    const fields = readFileSync(`/proc/${this.child.pid}/stat`, 'utf8').split(') ')[1]?.split(' ') ?? []
    return ((Number(fields[11]) + Number(fields[12])) * 1_000) / ticksPerSecond
  }

  /** Its resident memory, in MiB. */
  residentMib(): number {
    const [, kib] = /^VmRSS:\s+(\d+)/m.exec(readFileSync(`/proc/${this.child.pid}/status`, 'utf8')) ?? []
    return Number(kib) / 1_024
  }

  async stop(): Promise<void> {
    if (this.child.exitCode !== null || this.child.signalCode !== null) return
    const exit = once(this.child, 'exit')
    this.child.kill('SIGTERM')
    await exit
  }
}

/** Private stores, and the processes that are measured on them. */
export class Lab {
  private readonly subjects: Subject[] = []

  private constructor(
    private readonly directory: string,
    readonly stores: EmbeddedStores,
    readonly redis: Redis,
    readonly postgres: pg.Pool
  ) {}

  static async open(): Promise<Lab> {
    const directory = await mkdtemp(join(tmpdir(), 'mobile-signup-bench-'))
    const stores = await EmbeddedStores.prepare(directory)
    await stores.start()
    await migrate(stores.databaseUrl)
    const redis = new Redis(stores.redisUrl)
    const postgres = new pg.Pool({ connectionString: stores.databaseUrl })
    // A connection that the pool has ended may still hear that the server ends.
    postgres.on('error', () => undefined)
    return new Lab(directory, stores, redis, postgres)
  }

  async close(): Promise<void> {
    await Promise.all(this.subjects.map((subject) => subject.stop()))
    this.redis.disconnect()
    await this.postgres.end()
    await this.stores.stop()
    await rm(this.directory, { recursive: true })
  }

  async versions(): Promise<Record<string, string>> {
    const { rows } = await this.postgres.query('SHOW server_version')
    const [, redis = ''] = /redis_version:(\S+)/.exec(await this.redis.info('server')) ?? []
    return { postgres: rows[0].server_version, redis }
  }

  /** The built service with the given changes of its default configuration. */
  service(env: Record<string, string> = {}): Promise<Subject> {
    return this.start(['../dist/server.js'], /Server listening at (http:[^"]+)/, env)
  }

  /** A program of this folder that prints its URL first. */
  program(file: string): Promise<Subject> {
    return this.start([...typescript, file], /^(http:.+)/)
  }

  private async start(args: string[], announcement: RegExp, env: Record<string, string> = {}): Promise<Subject> {
    const file = fileURLToPath(new URL(args.at(-1) ?? '', import.meta.url))
    // A file of its own: whatever this process read would be its load on the two cores.
    const logFile = join(this.directory, `subject-${this.subjects.length}.log`)
    const log = await open(logFile, 'w')
    const child = spawn(process.execPath, [...args.slice(0, -1), file], {
      env: { PATH: process.env.PATH, PORT: '0', ...this.stores.environment({}), ...env },
      stdio: ['ignore', log.fd, 'inherit']
    })
    // Where a benchmark throws before its end.
    process.once('exit', () => child.kill('SIGKILL'))
    await log.close()
    let url: string | undefined
    while (url === undefined) {
      if (child.exitCode !== null || child.signalCode !== null) throw new Error(`${file} ended before it listened`)
      await sleep(20)
      url = announcement.exec(await readFile(logFile, 'utf8'))?.[1]
    }
    const subject = new Subject(url, child)
    this.subjects.push(subject)
    return subject
  }

  /** Runs a program of this folder to its end and reads the JSON that it prints. */
  static async run<Result>(file: string, ...args: number[]): Promise<Result> {
    const path = fileURLToPath(new URL(file, import.meta.url))
    const { stdout } = await promisify(execFile)(process.execPath, [path, ...args.map(String)])
    return JSON.parse(stdout)
  }
}
