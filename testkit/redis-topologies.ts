import { writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { Cluster, Redis } from 'ioredis'
import type { Test } from 'tap'
import { freePort, redisBinary } from '../dev/embedded-stores.js'
import { GuardedServer } from '../dev/guarded-server.js'
import { redisRules, redisUser } from './rights.js'
import { temporaryFolderFor } from './temporary-folder.js'
import { until } from './until.js'

/** The password of every server but the sentinel. It needs percent-encoding in a URL. */
export const password = 'p@ss:w/o#r?d,%ü'

/** The user of docs/operating.md. It has the same password as the administrator. */
const serviceCredentials = `${redisUser}:${encodeURIComponent(password)}@`

/** A Redis server on loopback. */
export interface RedisServer {
  readonly port: number
  /** For the service, with the user of docs/operating.md. */
  readonly url: string
  /** A connection to it as its administrator. */
  readonly admin: Redis
  /** Kills it at once, and resolves when it has ended. */
  kill(): Promise<void>
}

/** Several Redis servers, one of which may fail. Only a test causes a failover, never a busy machine. */
export interface RedisTopology {
  /** The servers that hold keys. Masters come first. */
  readonly servers: readonly RedisServer[]
  /** For the service, with the user of docs/operating.md. */
  readonly url: string
  /** A connection as administrator. */
  readonly redis: Redis
  /** Makes a replica the master, also of a master that is dead. Resolves when the others know. */
  failOver(): Promise<void>
}

/** So long that no automatic failover begins. */
const noFailoverMs = 600_000

/** Starts a Redis with more lines of configuration, and stops it after the test. */
export function startRedis(t: Test, lines: string[] = []): Promise<RedisServer> {
  const user = `user ${redisUser} ${redisRules(password)
    .map((rule) => `"${rule}"`)
    .join(' ')}`
  const passwords = [`requirepass "${password}"`, `masterauth "${password}"`]
  return startServer(t, [...passwords, user, 'save ""', 'repl-diskless-sync-delay 0', ...lines], { password })
}

async function startServer(t: Test, lines: string[], { password = '', mode = '' }): Promise<RedisServer> {
  const [directory, port] = [temporaryFolderFor(t), await freePort()]
  const config = join(directory, 'redis.conf')
  await writeFile(config, ['bind 127.0.0.1', `port ${port}`, `dir "${directory}"`, ...lines].join('\n'))
  const admin = new Redis({ port, lazyConnect: true, retryStrategy: () => null, ...(password && { password }) })
  admin.on('error', () => undefined)
  const command = [redisBinary(), config, ...(mode ? [mode] : [])]
  const server = GuardedServer.spawn('Redis', { command, identity: {} }, join(directory, 'log'))
  await server.untilReady(() => admin.connect())
  t.teardown(async () => {
    admin.disconnect()
    await server.stop()
  })
  // A sentinel closes all connections of a server that it makes a master.
  admin.options.retryStrategy = () => 50
  return {
    port,
    url: `redis://${serviceCredentials}127.0.0.1:${port}`,
    admin,
    async kill() {
      const [, pid] = /process_id:(\d+)/.exec(await admin.info('server')) ?? []
      admin.disconnect()
      process.kill(Number(pid), 'SIGKILL')
      await server.stop()
    }
  }
}

/** Returns whether a replica is in sync with its master. */
const isInSync = async ({ admin }: RedisServer) => (await admin.info('replication')).includes('master_link_status:up')

/** Starts a Cluster of three masters, and a replica of the first one. */
export async function startCluster(t: Test): Promise<RedisTopology> {
  const startNode = async () => {
    const busPort = await freePort()
    // Nodes exchange what they know more often with a short timeout, so it is short until the Cluster is complete.
    const lines = ['cluster-enabled yes', 'cluster-node-timeout 1000', 'cluster-replica-no-failover yes']
    return { busPort, ...(await startRedis(t, [...lines, `cluster-port ${busPort}`])) }
  }
  const nodes = await Promise.all([startNode(), startNode(), startNode(), startNode()])
  const [first, second, third, replica] = nodes
  const masters = [first, second, third]
  for (const { admin } of nodes) await admin.call('CLUSTER', 'MEET', '127.0.0.1', first.port, first.busPort)
  for (const [index, { admin }] of masters.entries())
    await admin.cluster('ADDSLOTSRANGE', index * 5_461, index < 2 ? (index + 1) * 5_461 - 1 : 16_383)
  const untilAll = (what: string, text: string) =>
    until(what, async () => {
      const infos = await Promise.all(nodes.map(({ admin }) => admin.cluster('INFO')))
      return infos.every((info) => info.includes(text))
    })
  await untilAll('every node knows the others', 'cluster_known_nodes:4')
  await replica.admin.cluster('REPLICATE', `${await first.admin.cluster('MYID')}`)
  await untilAll('the Cluster is complete', 'cluster_state:ok')
  await until('the replica is in sync', () => isInSync(replica))
  for (const { admin } of nodes) await admin.config('SET', 'cluster-node-timeout', noFailoverMs)
  // Otherwise it would not take over when a test tells it to.
  await replica.admin.config('SET', 'cluster-replica-no-failover', 'no')
  return {
    servers: nodes,
    url: `redis://${serviceCredentials}${nodes.map(({ port }) => `127.0.0.1:${port}`).join()}`,
    redis: clientOf(t, masters),
    async failOver() {
      await replica.admin.cluster('FAILOVER', 'TAKEOVER')
      const replicaId = `${await replica.admin.cluster('MYID')}`
      await until('the other masters know the new one', async () => {
        const views = await Promise.all([second, third].map(({ admin }) => admin.cluster('NODES')))
        return views.every((view) => new RegExp(`^${replicaId} .*master .* 0-`, 'm').test(`${view}`))
      })
    }
  }
}

/** Returns a client that tests use like that of a single Redis: for commands without a key, or with keys of several slots. */
function clientOf(t: Test, masters: readonly RedisServer[]): Redis {
  const nodes = masters.map(({ port }) => ({ host: '127.0.0.1', port }))
  // Without refreshes: one that is in flight at the disconnect would start the next one for ever (ioredis 6.0.0).
  const cluster = new Cluster(nodes, { redisOptions: { password }, slotsRefreshInterval: 0 })
  t.teardown(() => cluster.disconnect())
  for (const command of ['keys', 'client', 'config', 'script']) {
    const value = async (...args: string[]) =>
      (await Promise.all(masters.map(({ admin }) => admin.call(command, ...args.map(String))))).flat()
    Object.defineProperty(cluster, command, { value })
  }
  for (const command of ['del', 'exists']) {
    const value = async (...keys: string[]) => {
      const counts = await Promise.all(keys.flat().map((key) => cluster.call(command, key)))
      return counts.reduce((sum: number, count) => sum + Number(count), 0)
    }
    Object.defineProperty(cluster, command, { value })
  }
  return cluster as unknown as Redis
}

/** Starts a master with two replicas, and a sentinel that monitors them. */
export async function startSentinel(t: Test): Promise<RedisTopology & { master(): Promise<RedisServer> }> {
  const first = await startRedis(t)
  const replicas = await Promise.all([1, 2].map(() => startRedis(t, [`replicaof 127.0.0.1 ${first.port}`])))
  for (const replica of replicas) await until('the replica is in sync', () => isInSync(replica))
  const name = 'sign-ups'
  const lines = [
    `sentinel monitor ${name} 127.0.0.1 ${first.port} 1`,
    `sentinel auth-pass ${name} "${password}"`,
    `sentinel down-after-milliseconds ${name} ${noFailoverMs}`,
    `sentinel failover-timeout ${name} 3000`
  ]
  const sentinel = await startServer(t, lines, { mode: '--sentinel' })
  await until('the sentinel knows the replicas', async () => {
    const info = await sentinel.admin.info('sentinel')
    return info.includes('status=ok') && info.includes('slaves=2')
  })
  const servers = [first, ...replicas]
  /** Returns the server that the sentinel calls the master. */
  async function master(): Promise<RedisServer> {
    const address = await sentinel.admin.call('SENTINEL', 'GET-MASTER-ADDR-BY-NAME', name)
    const server = servers.find(({ port }) => `${address}` === `127.0.0.1,${port}`)
    if (server === undefined) throw new Error('the sentinel knows no master')
    return server
  }
  return {
    servers,
    url: `redis+sentinel://${serviceCredentials}127.0.0.1:${sentinel.port}/${name}/0`,
    redis: first.admin,
    master,
    async failOver() {
      const former = await master()
      // A sentinel refuses while it still works on an earlier failover.
      await until('the sentinel starts the failover', async () => {
        const answer = sentinel.admin.call('SENTINEL', 'FAILOVER', name)
        return (await answer.catch(() => undefined)) === 'OK'
      })
      await until('the sentinel knows the new master', async () => (await master()) !== former)
    }
  }
}
