import { rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { Redis } from 'ioredis'
import type { Test } from 'tap'
import { freePort, redisBinary } from '../dev/embedded-stores.js'
import { GuardedServer } from '../dev/guarded-server.js'
import { redisRules, redisUser } from './rights.js'
import { createTemporaryFolder } from './temporary-folder.js'
import { until } from './until.js'

/** The password of every server but the sentinels. It needs percent-encoding in a URL. */
export const password = 'p@ss:w/o#r?d,%ü'

/** The name of the master that the sentinels monitor. */
export const masterName = 'sign-ups'

/** A Redis server on loopback. */
export interface RedisServer {
  readonly port: number
  /** A connection to it as its administrator. */
  readonly admin: Redis
  /** Kills it at once, and resolves when it has ended. */
  kill(): Promise<void>
}

/** The user of docs/operating.md in a URL. It has the same password as the administrator. */
export const serviceCredentials = `${redisUser}:${encodeURIComponent(password)}@`

/** Starts a Redis with more lines of configuration, and stops it after the test. */
export async function startRedis(t: Test, lines: string[] = []): Promise<RedisServer> {
  const rules = redisRules(password).map((rule) => `"${rule}"`)
  const users = [`requirepass "${password}"`, `masterauth "${password}"`, `user ${redisUser} ${rules.join(' ')}`]
  const common = [...users, 'save ""', 'repl-diskless-sync-delay 0']
  return startServer(t, { arguments: [], lines: [...common, ...lines], password })
}

interface ServerOptions {
  arguments: string[]
  lines: string[]
  password?: string
}

async function startServer(t: Test, options: ServerOptions): Promise<RedisServer> {
  const directory = createTemporaryFolder()
  const port = await freePort()
  const configFile = join(directory, 'redis.conf')
  const common = ['bind 127.0.0.1', `port ${port}`, `dir "${directory}"`]
  await writeFile(configFile, [...common, ...options.lines].join('\n'))
  const admin = new Redis({
    port,
    lazyConnect: true,
    retryStrategy: () => null,
    ...(options.password !== undefined && { password: options.password })
  })
  admin.on('error', () => undefined)
  const command = { command: [redisBinary(), configFile, ...options.arguments], identity: {} }
  const server = GuardedServer.spawn('Redis', command, join(directory, 'log'))
  await server.untilReady(() => admin.connect())
  t.teardown(async () => {
    admin.disconnect()
    await server.stop()
    await rm(directory, { recursive: true })
  })
  // A sentinel closes all connections of a server that it makes a master.
  admin.options.retryStrategy = () => 50
  const pid = Number(/process_id:(\d+)/.exec(await admin.info('server'))?.[1])
  return {
    port,
    admin,
    async kill() {
      admin.disconnect()
      process.kill(pid, 'SIGKILL')
      await server.stop()
    }
  }
}

/** Redis as several servers, one of which may fail. Only a test causes a failover, never a busy machine. */
export interface Topology {
  /** The servers that hold keys. Masters come first. */
  readonly servers: readonly RedisServer[]
  /** Makes a replica the master, also of a master that is dead. Resolves when the others know. */
  failOver(): Promise<void>
}

/** How long a server must be silent for an automatic failover. */
const noFailoverMs = 600_000

/**
 * Nodes exchange what they know more often with a short timeout, so it is short until the Cluster is complete. No replica takes
 * over until then.
 */
const clusterStartTimeoutMs = 1_000

const slotCount = 16_384

/** Starts a Cluster of three masters with a replica each. The failover is of the first master. */
export async function startCluster(t: Test): Promise<Topology> {
  const nodes = await Promise.all(
    Array.from({ length: 6 }, async () => {
      const busPort = await freePort()
      const timeout = `cluster-node-timeout ${clusterStartTimeoutMs}`
      const lines = ['cluster-enabled yes', 'cluster-replica-no-failover yes', timeout, `cluster-port ${busPort}`]
      return { busPort, ...(await startRedis(t, lines)) }
    })
  )
  const [first, ...others] = nodes
  const firstReplica = nodes[3]
  if (first === undefined || firstReplica === undefined) throw new Error('no nodes')
  for (const { admin } of others) await admin.call('CLUSTER', 'MEET', '127.0.0.1', `${first.port}`, `${first.busPort}`)
  const [masters, replicas] = [nodes.slice(0, 3), nodes.slice(3)]
  for (const [index, { admin }] of masters.entries()) {
    const [from, end] = [index, index + 1].map((part) => Math.floor((part * slotCount) / masters.length))
    await admin.cluster('ADDSLOTSRANGE', Number(from), Number(end) - 1)
  }
  const infos = () => Promise.all(nodes.map(({ admin }) => admin.cluster('INFO')))
  await until('every node knows the others', async () =>
    (await infos()).every((info) => info.includes('cluster_known_nodes:6'))
  )
  for (const [index, { admin }] of replicas.entries()) {
    await admin.cluster('REPLICATE', `${await masters[index]?.admin.cluster('MYID')}`)
  }
  await until(
    'the Cluster is complete',
    async () => (await infos()).every((info) => info.includes('cluster_state:ok')) && (await areInSync(replicas))
  )
  await Promise.all(nodes.map(({ admin }) => admin.config('SET', 'cluster-node-timeout', noFailoverMs)))
  // Else a replica would not take over when a test tells it to.
  await Promise.all(replicas.map(({ admin }) => admin.config('SET', 'cluster-replica-no-failover', 'no')))
  return {
    servers: nodes,
    async failOver() {
      await firstReplica.admin.cluster('FAILOVER', 'TAKEOVER')
      const replicaId = `${await firstReplica.admin.cluster('MYID')}`
      await until('the other masters know the new one', async () => {
        const views = await Promise.all(masters.slice(1).map(({ admin }) => admin.cluster('NODES')))
        return views.every((view) => new RegExp(`^${replicaId} .*master .* 0-`, 'm').test(`${view}`))
      })
    }
  }
}

/** Returns whether replicas are in sync with their master. */
async function areInSync(replicas: readonly RedisServer[]): Promise<boolean> {
  const infos = await Promise.all(replicas.map(({ admin }) => admin.info('replication')))
  return infos.every((info) => info.includes('master_link_status:up'))
}

interface SentinelTopology extends Topology {
  readonly sentinels: readonly RedisServer[]
  /** Returns the server that the sentinels call the master. */
  master(): Promise<RedisServer>
}

/** Starts a master with two replicas, and three sentinels that monitor them. */
export async function startSentinels(t: Test): Promise<SentinelTopology> {
  const firstMaster = await startRedis(t)
  const replicas = await Promise.all([1, 2].map(() => startRedis(t, [`replicaof 127.0.0.1 ${firstMaster.port}`])))
  const servers = [firstMaster, ...replicas]
  await until('the replicas are in sync', () => areInSync(replicas))
  const lines = [
    `sentinel monitor ${masterName} 127.0.0.1 ${firstMaster.port} 2`,
    `sentinel auth-pass ${masterName} "${password}"`,
    `sentinel down-after-milliseconds ${masterName} ${noFailoverMs}`,
    `sentinel failover-timeout ${masterName} 3000`
  ]
  const sentinels = await Promise.all([1, 2, 3].map(() => startServer(t, { arguments: ['--sentinel'], lines })))
  await until('the sentinels agree', async () => {
    const views = await Promise.all(sentinels.map(({ admin }) => admin.info('sentinel')))
    return views.every((view) => view.includes('status=ok') && view.includes('slaves=2,sentinels=3'))
  })

  /** Returns the port of the master in the view of each sentinel. */
  const masterPorts = () =>
    Promise.all(
      sentinels.map(async ({ admin }) => {
        const address = await admin.call('SENTINEL', 'GET-MASTER-ADDR-BY-NAME', masterName)
        return Array.isArray(address) ? Number(address[1]) : undefined
      })
    )
  async function master(): Promise<RedisServer> {
    const [masterPort] = await masterPorts()
    const server = servers.find(({ port }) => port === masterPort)
    if (server === undefined) throw new Error('the sentinels know no master')
    return server
  }
  return {
    servers,
    sentinels,
    master,
    async failOver() {
      const { port: formerPort } = await master()
      const start = () => sentinels[0]?.admin.call('SENTINEL', 'FAILOVER', masterName)
      // A sentinel refuses while it still works on an earlier failover.
      await until('a sentinel starts the failover', async () => {
        try {
          return (await start()) === 'OK'
        } catch {
          return false
        }
      })
      await until('all sentinels know the new master', async () =>
        (await masterPorts()).every((port) => port !== formerPort)
      )
    }
  }
}
