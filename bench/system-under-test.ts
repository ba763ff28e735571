import { availableParallelism, tmpdir } from 'node:os'
import { fileURLToPath } from 'node:url'
import { freePort } from '../dev/embedded-stores.js'
import { type PrivateStores, startStores } from '../testkit/private-stores.js'
import { ServerProcess } from '../testkit/server-process.js'
import { isFulfilled, until } from '../testkit/until.js'

/** A server that listens, and its process. */
export interface Server {
  readonly url: string
  readonly process: ServerProcess
}

/** What a benchmark measures: servers in processes of their own, on private stores. Neither logs below `warn`. */
export class SystemUnderTest {
  private readonly processes: ServerProcess[] = []

  private constructor(readonly stores: PrivateStores) {}

  /** Starts the stores, and no server yet. On the disk, as in production, and because the largest benchmark takes gigabytes. */
  static async start(): Promise<SystemUnderTest> {
    return new SystemUnderTest(await startStores(undefined, tmpdir()))
  }

  /** Starts the built service. @param env changes the default configuration */
  startService(env: Record<string, string> = {}): Promise<Server> {
    return this.startServer(undefined, { LOG_LEVEL: 'warn', ...env })
  }

  startPlainHandler(): Promise<Server> {
    const file = fileURLToPath(new URL('./plain-handler.ts', import.meta.url))
    return this.startServer(['--import', import.meta.resolve('tsx/esm'), file], {})
  }

  async storeVersions(): Promise<Record<string, string>> {
    const { rows } = await this.stores.postgres.query('SHOW server_version')
    const [, redis = ''] = /redis_version:(\S+)/.exec(await this.stores.redis.info('server')) ?? []
    return { postgres: rows[0].server_version, redis }
  }

  /** Stops the servers and the stores, and deletes their files. */
  async stop(): Promise<void> {
    await Promise.all(this.processes.map((process) => process.stop()))
    for (const process of this.processes) process.dispose()
    await this.stores.stop()
  }

  /** @param args of `node`; undefined for the built service */
  private async startServer(args: string[] | undefined, variables: Record<string, string>): Promise<Server> {
    const port = await freePort()
    // As many threads as cores, which is the best for both. From Node.js 24.3 on, the service does it by itself.
    const UV_THREADPOOL_SIZE = `${availableParallelism()}`
    const env = { ...this.stores.environment, UV_THREADPOOL_SIZE, ...variables, PORT: `${port}` }
    const process = ServerProcess.start(args, { env })
    this.processes.push(process)
    const url = `http://127.0.0.1:${port}`
    await until('the server listens', () => isFulfilled(fetch(url)))
    return { url, process }
  }
}
