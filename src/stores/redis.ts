import fastifyRedis from '@fastify/redis'
import fp from 'fastify-plugin'
import { Cluster, Redis } from 'ioredis'
import type { Config } from '../config/config.js'
import { parseRedisUrl, type RedisTarget } from '../config/redis-url.js'
import { Refusal } from '../outcomes.js'
import { publicError } from '../telemetry/log.js'
import { waitForStore } from './wait-for-store.js'

declare module 'fastify' {
  interface FastifyInstance {
    /**
     * Runs commands on Redis.
     *
     * @throws {Refusal} `storage_unavailable` when Redis fails or does not answer in `STORE_TIMEOUT_MS`
     */
    onRedis<T>(run: (redis: Redis | Cluster) => Promise<T>): Promise<T>
  }
}

/** The service's own client, beside any that a host application has registered. */
const namespace = 'mobileSignup'

/** The longest pause between two attempts to reconnect. */
const reconnectMaxMs = 1_000

export const redis = fp<Pick<Config, 'redisUrl' | 'storeTimeoutMs' | 'otlpEndpoint'>>(
  async (fastify, { redisUrl, storeTimeoutMs, otlpEndpoint }) => {
    const client = connect(parseRedisUrl(redisUrl), storeTimeoutMs, otlpEndpoint === undefined)
    let connectionError: Error | undefined
    const onError = (err: Error) => {
      connectionError = err
      fastify.log.warn({ err }, 'the connection to Redis failed')
    }
    client.on('error', onError)
    client.on('node error', onError)
    if (client instanceof Cluster) client.on('+node', dropOnTimeout)
    else dropOnTimeout(client)
    // Not @fastify/redis's `closeClient`: its QUIT fails, and the shutdown with it, when Redis is away.
    fastify.addHook('onClose', () => client.disconnect())
    await waitForStore('Redis', async () => {
      if (client.status !== 'ready') throw connectionError ?? new Error('no connection yet')
      // A Cluster connects to a node with its first command, and refuses those that come meanwhile.
      if (client instanceof Cluster) await Promise.all(client.nodes('master').map((node) => node.ping()))
      // ioredis only warns when it cannot select the URL's database, and goes on with the first.
      else await client.select(client.options.db ?? 0)
    })
    await fastify.register(fastifyRedis, { client, namespace })

    fastify.decorate('onRedis', async <T>(run: (redis: Redis | Cluster) => Promise<T>) => {
      try {
        const trip = run(client)
        fastify.metrics?.observeRoundTrip('redis', trip)
        return await trip
      } catch (cause) {
        throw new Refusal('storage_unavailable', publicError(cause))
      }
    })
  },
  { fastify: '5.x', name: 'redis' }
)

/**
 * Drops a connection on which a command has timed out, so that no later command is sent on it. ioredis's own
 * `socketTimeout` does not: any reply on the socket clears it, also one to another command.
 */
function dropOnTimeout(connection: Redis): void {
  const sendCommand = connection.sendCommand.bind(connection)
  connection.sendCommand = (command, stream) => {
    const { stream: socket } = connection
    command.promise.catch(({ message }: Error) => {
      if (message === 'Command timed out') socket.destroy()
    })
    return sendCommand(command, stream)
  }
}

/**
 * ioredis is patient by default: it queues while Redis is away and sends again what was not answered. A sign-up would
 * rather hear at once that Redis is away, and a GETDEL must never run twice.
 *
 * @param enableAutoPipelining not where spans are made: all of a pipeline would be children of one request
 */
function connect(
  { topology, nodes, masterName, options }: RedisTarget,
  storeTimeoutMs: number,
  enableAutoPipelining: boolean
): Redis | Cluster {
  const retryStrategy = (attempt: number) => Math.random() * Math.min(reconnectMaxMs, 50 * 2 ** attempt)
  const redisOptions = {
    ...options,
    connectTimeout: storeTimeoutMs,
    commandTimeout: storeTimeoutMs,
    maxRetriesPerRequest: 0,
    autoResendUnfulfilledCommands: false
  }
  if (topology === 'cluster') {
    // Without auto-pipelining, which takes a script's second argument for the number of its keys, and so a wrong node's
    // pipeline.
    return new Cluster([...nodes], {
      redisOptions,
      enableOfflineQueue: false,
      clusterRetryStrategy: retryStrategy,
      slotsRefreshTimeout: storeTimeoutMs,
      // A node that is away is noticed also where no command meets it.
      slotsRefreshInterval: reconnectMaxMs,
      // What a node has refused to run, as it has other slots now, goes to the next one. What may have run does not.
      maxRedirections: 5,
      retryDelayOnFailover: 0,
      retryDelayOnClusterDown: 0,
      // A certificate has names.
      dnsLookup: (address, callback) => callback(null, address)
    })
  }
  const common = { ...redisOptions, enableOfflineQueue: false, enableAutoPipelining, retryStrategy }
  const [node] = nodes
  if (masterName === undefined) return new Redis({ ...common, ...node })
  return new Redis({
    ...common,
    sentinels: [...nodes],
    name: masterName,
    enableTLSForSentinelMode: options.tls !== undefined,
    ...(options.tls && { sentinelTLS: options.tls }),
    sentinelCommandTimeout: storeTimeoutMs,
    sentinelRetryStrategy: retryStrategy,
    // A master that a failover has made a replica. ioredis's `failoverDetector` would give up for good where it hears of the
    // failover while it connects.
    reconnectOnError: ({ message }: Error) => message.startsWith('READONLY')
  })
}
