import { execFile } from 'node:child_process'
import { chmod, chown, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { promisify } from 'node:util'
import pg from 'pg'
import { connectOnce, freePort, spawnPostgres } from '../dev/embedded-stores.js'
import type { GuardedServer } from '../dev/guarded-server.js'
import { FaultProxy } from './fault-proxy.js'
import { postmasterPid, queryOnce } from './postgres-admin.js'
import { initializedFolder } from './private-stores.js'
import { createTemporaryFolder } from './temporary-folder.js'
import { until } from './until.js'

/** The name by which a primary knows its standby. */
const standbyName = 'standby'

/** What a standby may still need after its copy was made. */
const keptWal = '256MB'

const run = promisify(execFile)

/** A Postgres server with its folder. */
class Server {
  private process: GuardedServer | undefined

  private constructor(
    readonly directory: string,
    readonly port: number,
    readonly url: string
  ) {}

  /** Creates a folder for a server. Starts nothing. */
  static async create(): Promise<Server> {
    const directory = createTemporaryFolder()
    // The servers do not run as root.
    await chmod(directory, 0o755)
    const secret = (await readFile(join(await initializedFolder(), 'secret'), 'utf8')).trim()
    const port = await freePort()
    return new Server(directory, port, `postgresql://postgres:${secret}@127.0.0.1:${port}/postgres`)
  }

  get data(): string {
    return join(this.directory, 'postgres')
  }

  /** Writes a file into the data folder, and makes the user of the server its owner. Postgres does not run as root. */
  async write(name: string, text: string): Promise<void> {
    const file = join(this.data, name)
    const { uid, gid } = await stat(this.data)
    await writeFile(file, text)
    await chown(file, uid, gid)
  }

  async start(): Promise<void> {
    this.process = spawnPostgres(this.data, this.port, join(this.directory, 'log'))
    await this.process.untilReady(() => connectOnce(this.url))
  }

  /** Ends it as an administrator does. */
  async stop(): Promise<void> {
    await this.process?.stop()
  }

  /** Ends it as a crash does. */
  async kill(): Promise<void> {
    process.kill(postmasterPid(this.data), 'SIGKILL')
    await this.stop()
  }

  async remove(): Promise<void> {
    await this.stop()
    await rm(this.directory, { recursive: true, force: true })
  }

  query<Row extends pg.QueryResultRow>(statement: string): Promise<Row[]> {
    return queryOnce<Row>(this.url, statement)
  }

  /** Changes a setting without a restart. */
  async set(name: string, value: string): Promise<void> {
    await this.query(`ALTER SYSTEM SET ${name} = '${value}'`)
    await this.query('SELECT pg_reload_conf()')
  }
}

/** A Postgres with an empty, migrated database and a standby, behind one address that leads to the primary. */
export class ReplicatedPostgres {
  private standby: { server: Server; link: FaultProxy } | undefined

  private constructor(
    readonly mode: 'synchronous' | 'asynchronous',
    private primary: Server,
    readonly address: FaultProxy
  ) {}

  /** @param mode whether a commit waits until the standby has it */
  static async start(mode: 'synchronous' | 'asynchronous'): Promise<ReplicatedPostgres> {
    const primary = await Server.create()
    await run('cp', ['-a', join(await initializedFolder(), 'postgres'), primary.data])
    await primary.start()
    await primary.set('wal_keep_size', keptWal)
    const replicated = new ReplicatedPostgres(mode, primary, await FaultProxy.open(primary.url))
    await replicated.addStandby()
    return replicated
  }

  /** Runs a statement on the primary. */
  query<Row extends pg.QueryResultRow>(statement: string): Promise<Row[]> {
    return this.primary.query<Row>(statement)
  }

  /** From now on the standby gets nothing. A failover loses what is committed meanwhile. */
  async stopReplicating(): Promise<void> {
    await this.standby?.link.apply('stall')
  }

  /** Kills the primary, promotes the standby, and lets the address lead to it. */
  async failOver(): Promise<void> {
    const { primary, standby } = this
    if (standby === undefined) throw new Error('there is no standby')
    await primary.kill()
    await standby.server.query('SELECT pg_promote()')
    await standby.link.close()
    this.primary = standby.server
    this.standby = undefined
    this.address.retarget(standby.server.url)
    await primary.remove()
  }

  /** Ends the primary as an administrator does, or as a crash does, and starts it again. */
  async restart(mode: 'fast' | 'immediate'): Promise<void> {
    await (mode === 'fast' ? this.primary.stop() : this.primary.kill())
    await this.primary.start()
  }

  /** Creates a standby from a copy of the running primary, and waits until it is in sync. */
  async addStandby(): Promise<void> {
    const { primary } = this
    const link = await FaultProxy.open(primary.url)
    const server = await Server.create()
    const backup = new pg.Client(primary.url)
    await backup.connect()
    await backup.query(`SELECT pg_backup_start('${standbyName}', true)`)
    // cp fails with 1 if a file vanishes meanwhile. The log has what the file had.
    await run('cp', ['-a', primary.data, server.data]).catch((error) => {
      if (error.code !== 1) throw error
    })
    const { rows } = await backup.query('SELECT labelfile FROM pg_backup_stop(false)')
    await backup.end()
    await rm(join(server.data, 'postmaster.pid'), { force: true })
    const { hostname, port, username, password } = new URL(link.url)
    await server.write('backup_label', rows[0].labelfile)
    await server.write('standby.signal', '')
    await server.write(
      'postgresql.auto.conf',
      `wal_keep_size = ${keptWal}
primary_conninfo = 'host=${hostname} port=${port} user=${username} password=${password} application_name=${standbyName}'
`
    )
    await server.start()
    this.standby = { server, link }
    if (this.mode === 'synchronous') await primary.set('synchronous_standby_names', standbyName)
    await until('the standby has all that the primary has', async () => {
      const [row] = await primary.query<{ inSync: boolean }>(
        `SELECT state = 'streaming' AND replay_lsn = pg_current_wal_lsn() AND
           (sync_state = 'sync') = ('${this.mode}' = 'synchronous') AS "inSync" FROM pg_stat_replication`
      )
      return row?.inSync === true
    })
  }

  async stop(): Promise<void> {
    await this.address.close()
    await this.standby?.link.close()
    await Promise.all([this.primary.remove(), this.standby?.server.remove()])
  }
}
