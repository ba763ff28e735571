import fastifyRedis from '@fastify/redis'
import fp from 'fastify-plugin'
import { Redis } from 'ioredis'
import type { Config } from '../config.js'
import { publicError } from '../logging.js'
import { Refusal } from '../replies.js'
import { waitForStore } from '../start-up.js'

declare module 'fastify' {
  interface FastifyInstance {
    /**
     * Runs commands on Redis.
     *
     * @throws {Refusal} `storage_unavailable` when Redis fails or does not answer in `STORE_TIMEOUT_MS`
     */
    onRedis<T>(run: (redis: Redis) => Promise<T>): Promise<T>
  }
}

/** The service's own client, beside any that a host application has registered. */
const namespace = 'mobileSignup'

/** The longest pause between two attempts to reconnect. */
const reconnectMaxMs = 1_000

export const redis = fp<Pick<Config, 'redisUrl' | 'storeTimeoutMs'>>(
  async (fastify, { redisUrl, storeTimeoutMs }) => {
    const client = new Redis(redisUrl, {
      connectTimeout: storeTimeoutMs,
      commandTimeout: storeTimeoutMs,
      // ioredis is patient by default: it queues while Redis is away and sends again what was not answered.
      // A sign-up would rather hear at once that Redis is away, and a GETDEL must never run twice.
      enableOfflineQueue: false,
      enableAutoPipelining: true,
      maxRetriesPerRequest: 0,
      autoResendUnfulfilledCommands: false,
      retryStrategy: (attempt) => Math.random() * Math.min(reconnectMaxMs, 50 * 2 ** attempt)
    })
    let connectionError: Error | undefined
    client.on('error', (err) => {
      connectionError = err
      fastify.log.warn({ err }, 'the connection to Redis failed')
    })
    // Not @fastify/redis's `closeClient`: its QUIT fails, and the shutdown with it, when Redis is away.
    fastify.addHook('onClose', () => client.disconnect())
    await waitForStore('Redis', async () => {
      if (client.status !== 'ready') throw connectionError ?? new Error('no connection yet')
      // ioredis only warns when it cannot select the URL's database, and goes on with the first.
      await client.select(client.options.db ?? 0)
    })
    await fastify.register(fastifyRedis, { client, namespace })

    fastify.decorate('onRedis', async <T>(run: (redis: Redis) => Promise<T>) => {
      try {
        return await run(client)
      } catch (cause) {
        // The connection may be dead without a word, and ioredis would keep it.
        if (isTimeout(cause) && client.status === 'ready') client.stream.destroy()
        throw new Refusal('storage_unavailable', publicError(cause))
      }
    })
  },
  { fastify: '5.x', name: 'redis' }
)

const isTimeout = (error: unknown) => error instanceof Error && error.message === 'Command timed out'
