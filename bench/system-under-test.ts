import { fileURLToPath } from 'node:url'
import { type PrivateStores, startStores } from '../testkit/private-stores.js'
import { ServerProcess } from '../testkit/server-process.js'

/** A server that listens, and its process. */
export interface Server {
  readonly url: string
  readonly process: ServerProcess
}

/** What a benchmark measures: servers in processes of their own, on private stores. */
export class SystemUnderTest {
  private readonly processes: ServerProcess[] = []

  private constructor(readonly stores: PrivateStores) {}

  /** Starts the stores, and no server yet. */
  static async start(): Promise<SystemUnderTest> {
    return new SystemUnderTest(await startStores())
  }

  /**
   * Starts the built service.
   *
   * @param env changes the default configuration
   */
  startService(env: Record<string, string> = {}): Promise<Server> {
    return this.waitForUrl(ServerProcess.start(undefined, { env: { ...this.stores.environment, ...env } }))
  }

  /** Starts a server of `yardsticks/`. It prints its URL when it listens. */
  startYardstick(file: string): Promise<Server> {
    const path = fileURLToPath(new URL(`./yardsticks/${file}`, import.meta.url))
    const args = ['--import', import.meta.resolve('tsx/esm'), path]
    return this.waitForUrl(ServerProcess.start(args, { env: this.stores.environment, announcement: /^(http:\S+)\n/ }))
  }

  async storeVersions(): Promise<{ postgres: string; redis: string }> {
    const { postgres, redis } = this.stores
    const { rows } = await postgres.query('SHOW server_version')
    const [, redisVersion = ''] = /redis_version:(\S+)/.exec(await redis.info('server')) ?? []
    return { postgres: rows[0].server_version, redis: redisVersion }
  }

  /** Stops the servers and the stores, and deletes their files. */
  async stop(): Promise<void> {
    await Promise.all(
      this.processes.map(async (process) => {
        await process.stop()
        process.dispose()
      })
    )
    await this.stores.stop()
  }

  private async waitForUrl(process: ServerProcess): Promise<Server> {
    this.processes.push(process)
    return { url: await process.url(), process }
  }
}
