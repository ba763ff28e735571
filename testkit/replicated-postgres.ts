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
import { createTemporaryFolder, memoryFolder } from './temporary-folder.js'
import { until } from './until.js'

/** The name by which a primary knows its standby. */
const standbyName = 'standby'

/**
 * The primary keeps the WAL that a standby needs after its base backup. A standby looks for its primary ten times a second. Without fsync a
 * SIGKILL loses nothing, because the operating system has the data.
 */
const settings = "wal_keep_size = '256MB'\nwal_retrieve_retry_interval = '100ms'\nfsync = off\n"

type Server = Awaited<ReturnType<typeof copyServer>>

/** Copies the data of a server, also of one that runs. Starts nothing. */
async function copyServer(source: string) {
  const directory = createTemporaryFolder(memoryFolder())
  // The servers do not run as root.
  await chmod(directory, 0o755)
  const data = join(directory, 'postgres')
  const secret = (await readFile(join(await initializedFolder(), 'secret'), 'utf8')).trim()
  const port = await freePort()
  const url = `postgresql://postgres:${secret}@127.0.0.1:${port}/postgres`
  // cp fails with 1 if a file vanishes meanwhile. The log has what the file had.
  await promisify(execFile)('cp', ['-a', source, data]).catch((error) => {
    if (error.code !== 1) throw error
  })
  await rm(join(data, 'postmaster.pid'), { force: true })
  let server: GuardedServer | undefined
  const stop = async () => server?.stop()
  return {
    data,
    url,
    /** Writes a file into the data folder, for the user of the server. */
    async write(name: string, text: string): Promise<void> {
      const { uid, gid } = await stat(data)
      await writeFile(join(data, name), text)
      await chown(join(data, name), uid, gid)
    },
    async start(): Promise<void> {
      server = spawnPostgres(data, port, join(directory, 'log'))
      await server.untilReady(() => connectOnce(url))
    },
    /** Ends it as an administrator does. */
    stop,
    /** Ends it as a crash does. */
    async kill(): Promise<void> {
      process.kill(postmasterPid(data), 'SIGKILL')
      await stop()
    },
    async remove(): Promise<void> {
      await stop()
      await rm(directory, { recursive: true, force: true })
    }
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
    const primary = await copyServer(join(await initializedFolder(), 'postgres'))
    await primary.write('postgresql.auto.conf', settings)
    await primary.start()
    const replicated = new ReplicatedPostgres(mode, primary, await FaultProxy.open(primary.url))
    await replicated.addStandby()
    return replicated
  }

  /** Runs a statement on the primary. */
  query<Row extends pg.QueryResultRow>(statement: string): Promise<Row[]> {
    return queryOnce<Row>(this.primary.url, statement)
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
    await queryOnce(standby.server.url, 'SELECT pg_promote()')
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
    const link = await FaultProxy.open(this.primary.url)
    const backup = new pg.Client(this.primary.url)
    await backup.connect()
    await backup.query(`SELECT pg_backup_start('${standbyName}', true)`)
    const server = await copyServer(this.primary.data)
    const { rows } = await backup.query('SELECT labelfile FROM pg_backup_stop(false)')
    await backup.end()
    const { hostname, port, username, password } = new URL(link.url)
    const connection = `host=${hostname} port=${port} user=${username} password=${password}`
    await server.write('backup_label', rows[0].labelfile)
    await server.write('standby.signal', '')
    await server.write(
      'postgresql.auto.conf',
      `${settings}primary_conninfo = '${connection} application_name=${standbyName}'\n`
    )
    await server.start()
    this.standby = { server, link }
    if (this.mode === 'synchronous') {
      await this.query(`ALTER SYSTEM SET synchronous_standby_names = '${standbyName}'`)
      await this.query('SELECT pg_reload_conf()')
    }
    await this.untilReplicated()
  }

  /** Waits until the standby has all that the primary has, and the mode of replication is that of this server. */
  async untilReplicated(): Promise<void> {
    await until('the standby has all that the primary has', async () => {
      const [row] = await this.query<{ inSync: boolean }>(
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
