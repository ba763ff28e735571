import { Type } from '@sinclair/typebox'
import type { FastifyPluginAsync, FastifyReply, FastifyRequest } from 'fastify'
import type { NamedStatement } from '../stores/postgres.js'

/** How long an answer of the stores holds, so that probes cost nothing however many there are. */
const freshMs = 1_000

const ping: NamedStatement = { name: 'ping', text: 'SELECT 1' }

const Failing = Type.Object({
  failing: Type.Array(Type.String(), { description: 'What is not ready', examples: [['Postgres']] })
})

/** For the probes of an orchestrator or a balancer, at the root. */
export const healthRoutes: FastifyPluginAsync = async (fastify) => {
  fastify.route({
    method: 'GET',
    url: '/health/live',
    schema: { tags: ['health'], operationId: 'live', summary: 'Whether the process lives' },
    config: { probe: true, outcomes: { healthy: undefined, busy: undefined } },
    handler: live
  })
  fastify.route({
    method: 'GET',
    url: '/health/ready',
    schema: { tags: ['health'], operationId: 'ready', summary: 'Whether the stores answer and no shutdown is near' },
    config: { probe: true, outcomes: { healthy: undefined, storage_unavailable: Failing, busy: Failing } },
    handler: ready
  })

  let failing: Promise<string[]> | undefined
  let askedAt = Number.NEGATIVE_INFINITY

  async function live(_request: FastifyRequest, reply: FastifyReply) {
    return reply.outcome('healthy')
  }

  async function ready(_request: FastifyRequest, reply: FastifyReply) {
    if (fastify.connections.closing) return reply.outcome('busy', { failing: ['shutting down'] })
    if (failing === undefined || performance.now() - askedAt > freshMs) {
      askedAt = performance.now()
      failing = failingStores()
    }
    const stores = await failing
    return stores.length === 0 ? reply.outcome('healthy') : reply.outcome('storage_unavailable', { failing: stores })
  }

  /** The stores that do not answer in STORE_TIMEOUT_MS. */
  async function failingStores(): Promise<string[]> {
    const answers = {
      Postgres: fastify.sql(ping, []),
      Redis: fastify.onRedis((redis) => redis.ping())
    }
    const results = await Promise.allSettled(Object.values(answers))
    return Object.keys(answers).filter((_, n) => results[n]?.status === 'rejected')
  }
}
