import { Type } from '@sinclair/typebox'
import type { FastifyPluginAsync, FastifyReply, FastifyRequest } from 'fastify'

/** How long a result of the checks is reused, so that many probes cost no more than one. */
const maxAgeMs = 1_000

const FailingData = Type.Object({
  failing: Type.Array(Type.String(), { description: 'What is not ready', examples: [['Postgres']] })
})

export interface HealthOptions {
  /** Checks by the name of what they check. A check that rejects has failed. */
  checks: Record<string, () => Promise<unknown>>
}

/** The probes of orchestrators and balancers, at the root. */
export const healthRoutes: FastifyPluginAsync<HealthOptions> = async (fastify, { checks }) => {
  fastify.route({
    method: 'GET',
    url: '/health/live',
    schema: { tags: ['health'], operationId: 'live', summary: 'Whether the process lives' },
    config: { probe: true, outcomes: ['healthy', 'busy'] },
    handler: live
  })
  fastify.route({
    method: 'GET',
    url: '/health/ready',
    schema: {
      tags: ['health'],
      operationId: 'ready',
      summary: 'Whether both stores answer and no shutdown has been announced'
    },
    config: {
      probe: true,
      outcomes: ['healthy', 'storage_unavailable', 'busy'],
      data: { storage_unavailable: FailingData, busy: FailingData }
    },
    handler: ready
  })

  let lastResult: Promise<string[]> | undefined
  let lastCheckAt = Number.NEGATIVE_INFINITY

  async function live(_request: FastifyRequest, reply: FastifyReply) {
    return reply.outcome('healthy')
  }

  async function ready(_request: FastifyRequest, reply: FastifyReply) {
    if (fastify.shutdown.isAnnounced) return reply.outcome('busy', { data: { failing: ['shutting down'] } })
    if (lastResult === undefined || performance.now() - lastCheckAt > maxAgeMs) {
      lastCheckAt = performance.now()
      lastResult = findFailing()
    }
    const failing = await lastResult
    if (failing.length > 0) return reply.outcome('storage_unavailable', { data: { failing } })
    return reply.outcome('healthy')
  }

  async function findFailing(): Promise<string[]> {
    const results = await Promise.allSettled(Object.values(checks).map((check) => check()))
    return Object.keys(checks).filter((_, index) => results[index]?.status === 'rejected')
  }
}
