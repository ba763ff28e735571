import { chmod, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import type { Redis } from 'ioredis'
import type { Test } from 'tap'
import { connectOnce, freePort } from '../dev/embedded-stores.js'
import { GuardedServer, unprivileged } from '../dev/guarded-server.js'
import { findProgram } from '../dev/programs.js'
import type { PrivateStores } from './private-stores.js'
import { startCluster, startSentinel } from './redis-topologies.js'
import { postgresRole, redisRules, redisUser, refusedObjects } from './rights.js'
import { temporaryFolderFor } from './temporary-folder.js'

/**
 * The timeout of statements behind the pooler, and of the round trips of the applications. On a busy machine the pooler is one
 * more process that may have to wait.
 */
export const poolerTimeoutMs = 5_000

/** What the applications of a test file use instead of one Postgres and one Redis with all rights. */
export interface Topology {
  environment: Record<string, string>
  /** A connection to Redis as administrator. By default that of the private stores. */
  redis?: Redis
  /** The Redis servers that must refuse the applications nothing. */
  admins?: Redis[]
}

/** Starts a topology for a test file, and stops it at its end. */
export async function startTopology(t: Test, name: string, stores: PrivateStores): Promise<Topology> {
  switch (name) {
    case 'rights':
      return { environment: await withDocumentedRights(stores), admins: [stores.redis] }
    case 'pooler': {
      const DATABASE_URL = await startPooler(t, stores.databaseUrl)
      return { environment: { DATABASE_URL, PG_POOLER: 'transaction', STORE_TIMEOUT_MS: `${poolerTimeoutMs}` } }
    }
    case 'cluster':
    case 'sentinel': {
      const { url, redis, servers } = await (name === 'cluster' ? startCluster(t) : startSentinel(t))
      return { environment: { REDIS_URL: url }, redis, admins: servers.map(({ admin }) => admin) }
    }
    default:
      throw new Error(`TESTBED_STORES=${name} is none of cluster, sentinel, pooler, rights and a URL of Postgres`)
  }
}

/** @throws if a Redis has refused the documented user anything */
export async function assertNothingRefused({ admins = [] }: Topology): Promise<void> {
  const refused = await Promise.all(admins.map(refusedObjects))
  if (refused.flat().length > 0) throw new Error(`the rights of docs/operating.md do not suffice for ${refused.flat()}`)
}

/** Creates the users of docs/operating.md. @returns the variables of a service with no more rights than they have */
export async function withDocumentedRights({ postgres, redis, databaseUrl, redisUrl }: PrivateStores) {
  const password = 'of-the-service'
  const urlOf = (url: string, username: string) => Object.assign(new URL(url), { username, password }).href
  await postgres.query(postgresRole(password))
  await redis.call('ACL', 'SETUSER', redisUser, ...redisRules(password))
  return {
    DATABASE_URL: urlOf(databaseUrl, 'mobile_signup'),
    REDIS_URL: urlOf(redisUrl, redisUser),
    MIGRATE: 'false'
  }
}

/** Starts a PgBouncer in transaction mode in front of a Postgres. @returns the URL of Postgres through it */
export async function startPooler(t: Test, databaseUrl: string): Promise<string> {
  const program = findProgram('pgbouncer') ?? '/usr/sbin/pgbouncer'
  const directory = temporaryFolderFor(t)
  const { hostname, port, username, password } = new URL(databaseUrl)
  const url = Object.assign(new URL(databaseUrl), { port: await freePort() })
  const [config, users] = [join(directory, 'pgbouncer.ini'), join(directory, 'users')]
  await writeFile(users, `"${username}" "${password}"\n`)
  // The pool is smaller than that of a service, so that its statements change their connection to Postgres.
  await writeFile(
    config,
    `[databases]
* = host=${hostname} port=${port} connect_query='SET statement_timeout = ${poolerTimeoutMs}'
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = ${url.port}
unix_socket_dir =
auth_type = scram-sha-256
auth_file = ${users}
pool_mode = transaction
default_pool_size = 3
max_client_conn = 200
`
  )
  // PgBouncer does not run as root, and must read the files.
  await chmod(directory, 0o755)
  const server = GuardedServer.spawn('PgBouncer', unprivileged([program, config]), join(directory, 'log'))
  t.teardown(() => server.stop())
  await server.untilReady(() => connectOnce(url.href))
  return url.href
}
