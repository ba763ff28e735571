import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { Redis } from 'ioredis'
import type { Test } from 'tap'
import { GuardedServer } from '../src/dev/guarded-server.js'
import { freePort, redisBinary } from '../src/dev/stores.js'
import { until } from './helper.js'

/** It needs percent-encoding in a URL, every character of it. */
export const password = 'p@ss:w/o#r?d,%ü'

/** A real Redis server of a test, on loopback. */
export interface RedisServer {
  port: number
  /** A connection to it as its administrator. */
  admin: Redis
  /** Ends it as a crash would. */
  kill(): Promise<void>
}

/** Starts a Redis with a password and some lines of configuration, until the end of the test. */
export async function startRedis(t: Test, lines: string[] = [], sentinel = false): Promise<RedisServer> {
  const directory = await mkdtemp(join(tmpdir(), 'mobile-signup-redis-'))
  const port = await freePort()
  const admin = new Redis({ port, lazyConnect: true, retryStrategy: () => null, ...(!sentinel && { password }) })
  admin.on('error', () => undefined)
  const config = join(directory, 'redis.conf')
  const auth = sentinel
    ? []
    : [`requirepass "${password}"`, `masterauth "${password}"`, 'save ""', 'repl-diskless-sync-delay 0']
  await writeFile(config, ['bind 127.0.0.1', `port ${port}`, `dir "${directory}"`, ...auth, ...lines].join('\n'))
  const command = { command: [redisBinary(), config, ...(sentinel ? ['--sentinel'] : [])], identity: {} }
  const server = await GuardedServer.start('Redis', command, join(directory, 'log'), () => admin.connect())
  t.teardown(async () => {
    admin.disconnect()
    await server.stop()
    await rm(directory, { recursive: true })
  })
  return {
    port,
    admin,
    async kill() {
      const [, pid] = /process_id:(\d+)/.exec(await admin.info('server')) ?? []
      process.kill(Number(pid), 'SIGKILL')
      await server.stop()
    }
  }
}

const slots = 16_384

/** Three masters with a replica each, which take over a second after their master's death. */
export async function startCluster(t: Test): Promise<RedisServer[]> {
  const busPorts: number[] = []
  const servers = await Promise.all(
    Array.from({ length: 6 }, async (_, n) => {
      busPorts[n] = await freePort()
      return startRedis(t, ['cluster-enabled yes', 'cluster-node-timeout 1000', `cluster-port ${busPorts[n]}`])
    })
  )
  const [first, ...others] = servers
  for (const { admin } of others) await admin.call('CLUSTER', 'MEET', '127.0.0.1', `${first?.port}`, `${busPorts[0]}`)
  const [masters, replicas] = [servers.slice(0, 3), servers.slice(3)]
  for (const [n, { admin }] of masters.entries()) {
    const [from, end] = [n, n + 1].map((part) => Math.floor((part * slots) / masters.length))
    await admin.cluster('ADDSLOTSRANGE', Number(from), Number(end) - 1)
  }
  await until(async () => {
    const known = await Promise.all(servers.map(({ admin }) => admin.cluster('INFO')))
    return known.every((info) => info.includes('cluster_known_nodes:6'))
  })
  for (const [n, { admin }] of replicas.entries()) {
    await admin.cluster('REPLICATE', `${await masters[n]?.admin.cluster('MYID')}`)
  }
  await until(async () => {
    const states = await Promise.all(servers.map(({ admin }) => admin.cluster('INFO')))
    return states.every((info) => info.includes('cluster_state:ok')) && (await areLinked(replicas))
  })
  return servers
}

/** Whether replicas have all that their master has. */
async function areLinked(replicas: readonly RedisServer[]): Promise<boolean> {
  const links = await Promise.all(replicas.map(({ admin }) => admin.info('replication')))
  return links.every((info) => info.includes('master_link_status:up'))
}

/** A master with two replicas, and three sentinels that replace it a second after its death. */
export async function startSentinels(t: Test): Promise<{ servers: RedisServer[]; sentinels: RedisServer[] }> {
  const master = await startRedis(t)
  const replicas = await Promise.all([1, 2].map(() => startRedis(t, [`replicaof 127.0.0.1 ${master.port}`])))
  await until(() => areLinked(replicas))
  const sentinels = await Promise.all(
    [1, 2, 3].map(() =>
      startRedis(
        t,
        [
          `sentinel monitor sign-ups 127.0.0.1 ${master.port} 2`,
          `sentinel auth-pass sign-ups "${password}"`,
          'sentinel down-after-milliseconds sign-ups 1000',
          'sentinel failover-timeout sign-ups 3000'
        ],
        true
      )
    )
  )
  await until(async () => {
    const views = await Promise.all(sentinels.map(({ admin }) => admin.info('sentinel')))
    return views.every((view) => view.includes('status=ok') && view.includes('slaves=2,sentinels=3'))
  })
  return { servers: [master, ...replicas], sentinels }
}
