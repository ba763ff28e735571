import { chmod, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { connectOnce, freePort } from '../dev/embedded-stores.js'
import { GuardedServer, unprivileged } from '../dev/guarded-server.js'
import { findProgram } from '../dev/programs.js'
import { createTemporaryFolder } from './temporary-folder.js'

/** Fewer than the connections of a service, so that its statements change their connection to Postgres. */
const poolSize = 3

/**
 * The timeout of statements, and of the round trips of the applications. Longer than the default, because on a busy machine the
 * pooler is one more process that may have to wait.
 */
export const poolerTimeoutMs = 5_000

export interface Pooler {
  /** The URL of Postgres through the pooler. */
  readonly url: string
  stop(): Promise<void>
}

/** Starts a PgBouncer in transaction mode in front of a Postgres. */
export async function startPooler(databaseUrl: string): Promise<Pooler> {
  const program = findProgram('pgbouncer') ?? '/usr/sbin/pgbouncer'
  const directory = createTemporaryFolder()
  const { hostname, port, username, password } = new URL(databaseUrl)
  const url = new URL(databaseUrl)
  url.port = `${await freePort()}`
  const [config, users] = [join(directory, 'pgbouncer.ini'), join(directory, 'users')]
  await writeFile(users, `"${username}" "${password}"\n`)
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
default_pool_size = ${poolSize}
max_client_conn = 200
`
  )
  // PgBouncer does not run as root, and must read the files.
  await chmod(directory, 0o755)
  const server = GuardedServer.spawn('PgBouncer', unprivileged([program, config]), join(directory, 'log'))
  await server.untilReady(() => connectOnce(url.href))
  return {
    url: url.href,
    async stop() {
      await server.stop()
      await rm(directory, { recursive: true })
    }
  }
}
