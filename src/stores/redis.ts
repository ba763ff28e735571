import fastifyRedis from '@fastify/redis'
import fp from 'fastify-plugin'
import { Cluster, Redis } from 'ioredis'
import type { Config } from '../config/config.js'
import { parseRedisUrl, type RedisTarget } from '../config/redis-url.js'
import { Refusal } from '../outcomes.js'
import { redactError } from '../telemetry/log.js'
import { type Observer, observeRoundTrip } from '../telemetry/observer.js'
import { waitForStore } from './wait-for-store.js'

declare module 'fastify' {
  interface FastifyInstance {
    /**
     * Runs commands on Redis.
     *
     * @throws {Refusal} `storage_unavailable` if Redis fails or does not answer within `STORE_TIMEOUT_MS`
     */
    withRedis<T>(run: (redis: Redis | Cluster) => Promise<T>): Promise<T>
  }
}

/** A name of its own, because a host application may have registered @fastify/redis, too. */
const namespace = 'mobileSignup'

/** The longest pause between two attempts to reconnect. */
const reconnectIntervalMaxMs = 1_000

export const redis = fp<{ config: Config; observer?: Observer | undefined }>(
  async (fastify, { config: { redisUrl, storeTimeoutMs, otlpEndpoint }, observer }) => {
    // With tracing, all commands of an automatic pipeline would be spans of one request.
    const client = connect(parseRedisUrl(redisUrl), storeTimeoutMs, otlpEndpoint === undefined)
    let lastError: Error | undefined
    const logError = (err: Error) => {
      lastError = err
      fastify.log.warn({ err }, 'the connection to Redis failed')
    }
    client.on('error', logError)
    client.on('node error', logError)
    // Instead of @fastify/redis's `closeClient`: its QUIT fails the shutdown while Redis does not answer.
    fastify.addHook('onClose', () => client.disconnect())
    await waitForStore('Redis', async () => {
      if (client.status !== 'ready') throw lastError ?? new Error('not connected yet')
      // A Cluster connects to a node with the first command for it, and refuses commands until then.
      if (client instanceof Cluster) await Promise.all(client.nodes('master').map((node) => node.ping()))
      // If ioredis cannot select the database of the URL, it only warns and uses database 0.
      else await client.select(client.options.db ?? 0)
    })
    await fastify.register(fastifyRedis, { client, namespace })

    fastify.decorate('withRedis', async <T>(run: (redis: Redis | Cluster) => Promise<T>) => {
      try {
        return await observeRoundTrip(observer, 'redis', run(client))
      } catch (cause) {
        throw new Refusal('storage_unavailable', redactError(cause))
      }
    })
  },
  { fastify: '5.x', name: 'redis' }
)

/**
 * Connects without ioredis's patience: by default it queues commands while Redis is away and resends unanswered ones. A
 * sign-up must fail fast instead, and a GETDEL must never run twice.
 */
function connect(target: RedisTarget, storeTimeoutMs: number, enableAutoPipelining: boolean): Redis | Cluster {
  const retryStrategy = (attempt: number) => Math.random() * Math.min(reconnectIntervalMaxMs, 50 * 2 ** attempt)
  const redisOptions = {
    ...target.options,
    connectTimeout: storeTimeoutMs,
    commandTimeout: storeTimeoutMs,
    maxRetriesPerRequest: 0,
    autoResendUnfulfilledCommands: false
  }
  if (target.topology === 'cluster') {
    // Without automatic pipelines: ioredis routes a script by its second argument, so to the wrong node.
    const cluster = new Cluster([...target.nodes], {
      redisOptions,
      enableOfflineQueue: false,
      clusterRetryStrategy: retryStrategy,
      slotsRefreshTimeout: storeTimeoutMs,
      // Finds a dead node also when no command is sent to it.
      slotsRefreshInterval: reconnectIntervalMaxMs,
      // A command that a node refused because the slot has moved is redirected. One that may have run is not resent.
      maxRedirections: 5,
      retryDelayOnFailover: 0,
      retryDelayOnClusterDown: 0,
      // Keeps the host names, which certificates are checked against.
      dnsLookup: (address, callback) => callback(null, address)
    })
    return cluster.on('+node', dropOnTimeout)
  }
  const options = { ...redisOptions, enableOfflineQueue: false, enableAutoPipelining, retryStrategy }
  const client =
    target.masterName === undefined
      ? new Redis({ ...options, ...target.nodes[0] })
      : new Redis({
          ...options,
          sentinels: [...target.nodes],
          name: target.masterName,
          enableTLSForSentinelMode: target.options.tls !== undefined,
          ...(target.options.tls && { sentinelTLS: target.options.tls }),
          sentinelCommandTimeout: storeTimeoutMs,
          sentinelRetryStrategy: retryStrategy,
          // Leaves a master that a failover has made a replica. ioredis's `failoverDetector` ends the client for good if it
          // hears of a failover while it connects.
          reconnectOnError: ({ message }: Error) => message.startsWith('READONLY')
        })
  dropOnTimeout(client)
  return client
}

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
