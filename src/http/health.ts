import { Type } from '@sinclair/typebox'
import type { FastifyPluginAsync, FastifyReply, FastifyRequest } from 'fastify'

/** How long a result of the checks is reused, so that many probes cost no more than one. */
const maxAgeMs = 1_000

const FailingData = Type.Object({
  failing: Type.Array(Type.String(), {
    description: 'Why the instance is not ready, or which stores are away',
    examples: [['Postgres']]
  })
})

/** Checks of the stores by their names. A check that rejects has failed. */
export class StoreChecks {
  private lastResult: Promise<string[]> | undefined
  private lastCheckAt = Number.NEGATIVE_INFINITY

  constructor(private readonly checks: Record<string, () => Promise<unknown>>) {}

  /** The names of all stores. */
  get names(): string[] {
    return Object.keys(this.checks)
  }

  /** Returns the names of the stores that fail. Checks at most once a second. */
  failing(): Promise<string[]> {
    if (this.lastResult === undefined || performance.now() - this.lastCheckAt > maxAgeMs) {
      this.lastCheckAt = performance.now()
      this.lastResult = this.findFailing()
    }
    return this.lastResult
  }

  private async findFailing(): Promise<string[]> {
    const results = await Promise.allSettled(Object.values(this.checks).map((check) => check()))
    return this.names.filter((_, index) => results[index]?.status === 'rejected')
  }
}

export interface HealthOptions {
  /**
   * All instances share the stores. If one is away, the probe names it and still succeeds: instances that were taken out of
   * the balancer could neither answer 503 with a `Retry-After` nor, while only Postgres is away, go on with sessions.
   */
  storeChecks: StoreChecks
  /** Returns why this instance alone cannot serve, or undefined. */
  ownFailure(): string | undefined
}

/** The probes of orchestrators and balancers, at the root. */
export const healthRoutes: FastifyPluginAsync<HealthOptions> = async (fastify, { storeChecks, ownFailure }) => {
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
      summary: 'Whether this instance can serve, and which stores are away'
    },
    config: {
      probe: true,
      outcomes: ['healthy', 'busy'],
      data: { healthy: FailingData, busy: FailingData }
    },
    handler: ready
  })

  async function live(_request: FastifyRequest, reply: FastifyReply) {
    return reply.outcome('healthy')
  }

  async function ready(_request: FastifyRequest, reply: FastifyReply) {
    const failure = ownFailure()
    if (failure !== undefined) return reply.outcome('busy', { data: { failing: [failure] } })
    return reply.outcome('healthy', { data: { failing: await storeChecks.failing() } })
  }
}
