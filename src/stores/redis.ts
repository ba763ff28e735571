import type { Socket } from 'node:net'
import fastifyRedis from '@fastify/redis'
import type { FastifyInstance } from 'fastify'
import { Cluster, Redis, ReplyError } from 'ioredis'
import type { Config } from '../config/config.js'
import { parseRedisUrl, type RedisTarget } from '../config/redis-url.js'
import { type Observer, observeRoundTrip } from '../telemetry/observer.js'
import { sampledWarnings } from '../telemetry/sampled-warnings.js'
import { isProgrammingError, StoreUnavailable } from './store-unavailable.js'
import { waitForStore } from './wait-for-store.js'

export type RedisStore = Awaited<ReturnType<typeof openRedis>>

/** A separate namespace, because an application that registers the `signUp` plugin may use @fastify/redis, too. */
const namespace = 'mobileSignup'

/** The longest pause before the next attempt to reconnect. All requests are refused meanwhile. */
const reconnectPauseMaxMs = 200

/** How often a Cluster client asks for the nodes and their slots. So it detects a dead node even if no command is sent to it. */
const slotsRefreshIntervalMs = 1_000

/**
 * Connects to Redis, and lends the client to @fastify/redis. It ends with the application.
 *
 * @throws if Redis does not answer within 10 s, or is older than 6.2
 */
export async function openRedis(
  fastify: FastifyInstance,
  { redisUrl, storeTimeoutMs }: Config,
  observer: Observer | undefined
) {
  const client = connect(parseRedisUrl(redisUrl), storeTimeoutMs)
  const warn = sampledWarnings(fastify.log)
  let lastError: Error | undefined
  const logError = (err: Error) => {
    lastError = err
    warn(err, 'the connection to Redis failed')
  }
  client.on('error', logError)
  // Only a Cluster has this event. Its other nodes answer, so it is no outage that ends.
  client.on('node error', (err: Error) => warn(err, 'the connection to Redis failed'))
  // Not with `closeClient` of @fastify/redis: it sends QUIT, and if Redis does not answer, the shutdown fails.
  fastify.addHook('onClose', () => {
    client.disconnect()
    // If ioredis 6.0.0 is closed while it refreshes the slots, it refreshes them for ever, and the process does not end.
    if (client instanceof Cluster) client.refreshSlotsCache = () => undefined
  })
  await waitForStore('Redis', async () => {
    if (client.status !== 'ready') throw lastError ?? new Error('not connected yet')
    if (client instanceof Cluster) {
      // A Cluster client connects to a node when the first command for it arrives, and refuses commands while it connects.
      await Promise.all(client.nodes('master').map((node) => node.ping()))
    } else {
      // If ioredis cannot select the database of the URL, it only warns and uses database 0. Here it fails the start.
      await client.select(client.options.db ?? 0)
    }
  })
  const servers = client instanceof Cluster ? client.nodes('master') : [client]
  const policies = await Promise.all(servers.map(checkServer)).catch((error) => {
    client.disconnect()
    throw error
  })
  if (policies.some((policy) => policy !== 'noeviction'))
    fastify.log.warn({ policies }, 'the maxmemory-policy of Redis is not noeviction: it may evict codes and sessions')
  lastError = undefined
  await fastify.register(fastifyRedis, { client, namespace })

  return {
    /** Whether the keys are on several nodes. */
    isCluster: client instanceof Cluster,
    /** Adds Lua scripts to the commands of the client. Nothing is sent. Without `numberOfKeys` it is the first argument. */
    defineScripts(scripts: Record<string, { lua: string; numberOfKeys?: number }>): void {
      for (const [name, script] of Object.entries(scripts)) client.defineCommand(name, script)
    },
    /**
     * Runs a command on Redis.
     *
     * @throws {StoreUnavailable} if Redis cannot serve now, or does not answer within `STORE_TIMEOUT_MS`
     * @throws {Error} the error of Redis or of `command`, if it shows a bug, such as a missing right
     */
    async run<T>(command: (client: Redis | Cluster) => Promise<T>): Promise<T> {
      try {
        const result = await observeRoundTrip(observer, 'redis', command(client))
        // After a command, not when it connects: a server that is no master accepts connections, too.
        if (lastError !== undefined) fastify.log.info('Redis answers again')
        lastError = undefined
        return result
      } catch (error) {
        if (!isOutage(error)) throw error
        warn(error, 'a round trip to Redis failed')
        throw new StoreUnavailable('redis', error)
      }
    }
  }
}

/**
 * Connects with ioredis's queueing, retries and resending turned off. By default it queues commands while Redis is away and
 * resends unanswered ones. A sign-up must fail fast instead, and the hold of a code must never run twice.
 */
function connect(target: RedisTarget, storeTimeoutMs: number): Redis | Cluster {
  const retryStrategy = () => Math.random() * reconnectPauseMaxMs
  const redisOptions = {
    ...target.options,
    connectTimeout: storeTimeoutMs,
    commandTimeout: storeTimeoutMs,
    maxRetriesPerRequest: 0,
    autoResendUnfulfilledCommands: false
  }
  if (target.topology === 'cluster') {
    const cluster = new Cluster([...target.nodes], {
      redisOptions,
      enableOfflineQueue: false,
      clusterRetryStrategy: retryStrategy,
      slotsRefreshTimeout: storeTimeoutMs,
      slotsRefreshInterval: slotsRefreshIntervalMs,
      // Follows MOVED and ASK: the node has not run the command.
      maxRedirections: 5,
      // 0 turns resending off: a command on a closed connection may have run.
      retryDelayOnFailover: 0,
      retryDelayOnClusterDown: 0,
      // Keeps the host names: TLS checks the certificate against the name.
      dnsLookup: (address, callback) => callback(null, address)
    })
    cluster.on('+node', (node: Redis) => {
      dropWhenUnusable(node)
      hearSocketErrors(node)
    })
    return cluster
  }
  const options = { ...redisOptions, enableOfflineQueue: false, retryStrategy }
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
          sentinelRetryStrategy: retryStrategy
        })
  dropWhenUnusable(client)
  hearSocketErrors(client)
  return client
}

/** Replies of a server that cannot serve now. An error of a script has the word in its middle. */
const outageReply =
  /\b(READONLY|LOADING|MASTERDOWN|CLUSTERDOWN|TRYAGAIN|BUSY|OOM|MISCONF|NOREPLICAS|max number of clients reached)\b/

/**
 * Whether a retry may succeed without a change of Redis or of this service. Any other reply is a bug: a missing right, a key of
 * another type, an error of a script. The other errors of ioredis are lost connections and timeouts, mostly of class `Error`.
 */
function isOutage(error: unknown): error is Error {
  if (!(error instanceof Error)) return false
  return error instanceof ReplyError ? outageReply.test(error.message) : !isProgrammingError(error)
}

/** @returns its maxmemory-policy. @throws if the server is older than 6.2, the first with GETDEL */
async function checkServer(server: Redis): Promise<string> {
  const [, version = '', major, minor] = /redis_version:((\d+)\.(\d+)\S*)/.exec(await server.info('server')) ?? []
  if (Number(major) > 6 || (Number(major) === 6 && Number(minor) >= 2))
    return /maxmemory_policy:(\S+)/.exec(await server.info('memory'))?.[1] ?? 'noeviction'
  throw new Error(`Redis is too old: version ${version || 'unknown'}, expected 6.2 or later`)
}

/**
 * Answers of a server that is no master, or not yet: after a failover behind one address (a VIP, a DNS name), or a restart.
 * A later connection finds the new master. An error of a script has the word in its middle.
 *
 * `failoverDetector` of ioredis is no alternative: if a failover happens while it connects, it ends the client permanently.
 */
const noMasterAnswer = /\b(READONLY|LOADING)\b/

/**
 * Drops a connection on which a command has timed out, because later commands would wait behind it, or whose server is no
 * master.
 *
 * `socketTimeout` of ioredis is not enough for the first: any reply resets it, even the reply to another command. Neither is
 * `reconnectOnError` for the second: while a server loads, the ready check of ioredis waits on the same connection.
 *
 * Wraps `sendCommand` to remember the socket of each command: after a reconnect the connection has another one. ioredis
 * has no class for the errors, so the message tells (test/outages.test.ts).
 */
function dropWhenUnusable(connection: Redis): void {
  const sendCommand = connection.sendCommand.bind(connection)
  connection.sendCommand = (command, stream) => {
    // A node of a Cluster queues its first command, and has no socket before it connects. The command comes here again then.
    const socket: Socket | undefined = connection.stream
    writeOncePerTurn(socket)
    command.promise.then(
      (reply) => {
        if (command.name === 'info' && `${reply}`.includes('\nloading:1')) socket?.destroy(new Error('LOADING'))
      },
      ({ message }: Error) => {
        if (noMasterAnswer.test(message)) socket?.destroy(new Error(message))
        else if (message === 'Command timed out') socket?.destroy(new Error('a command has timed out'))
      }
    )
    return sendCommand(command, stream)
  }
}

/**
 * Writes the commands of one turn of the event loop together. The writes of a socket cost more than all else that ioredis does.
 */
function writeOncePerTurn(socket: Socket | undefined): void {
  if (socket === undefined || socket.writableCorked > 0) return
  socket.cork()
  process.nextTick(() => socket.uncork())
}

/**
 * Hears every error of the sockets of a connection. ioredis hears one of each socket. TLS may emit a second one, for example an alert
 * after the certificate was refused, and an error that nobody hears ends the process.
 */
function hearSocketErrors(connection: Redis): void {
  let socket: Socket | undefined
  Object.defineProperty(connection, 'stream', {
    get: () => socket,
    set(next: Socket | undefined) {
      socket = next?.on('error', () => undefined)
    }
  })
}
