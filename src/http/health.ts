import { setTimeout as sleep } from 'node:timers/promises'
import { Type } from '@sinclair/typebox'
import type { FastifyPluginAsync, FastifyReply, FastifyRequest } from 'fastify'

/** How long a result of the checks is reused, so that many probes cost no more than one. */
const maxAgeMs = 1_000

/** How long an answer waits for a check, in ms. Kubernetes gives a probe one second by default. */
const patienceMs = 500

const FailingData = Type.Object({
  failing: Type.Array(Type.String(), {
    description: 'Why the instance is not ready, or which stores are away',
    examples: [['Postgres']]
  })
})

/** Runs the checks of the stores. A check fails if its promise rejects. */
export class StoreChecks {
  /** The last result of each check, while it may be used again. */
  private readonly results = new Map<string, Promise<boolean>>()

  constructor(private readonly checks: Readonly<Record<string, () => Promise<unknown>>>) {}

  /** The names of all stores. */
  get names(): readonly string[] {
    return Object.keys(this.checks)
  }

  /** Returns the names of the stores that fail, or do not answer within half a second. */
  async failing(): Promise<string[]> {
    const patience = sleep(patienceMs, true, { ref: false })
    const results = Object.entries(this.checks).map(([name, check]) =>
      Promise.race([this.results.get(name) ?? this.run(name, check), patience])
    )
    const hasFailed = await Promise.all(results)
    return this.names.filter((_, index) => hasFailed[index])
  }

  /** A check runs at most once at a time, and at most once a second. */
  private run(name: string, check: () => Promise<unknown>): Promise<boolean> {
    const result = check().then(
      () => false,
      () => true
    )
    this.results.set(name, result)
    // The result is used again for one second, or until the check has ended if that takes longer.
    Promise.all([result, sleep(maxAgeMs, undefined, { ref: false })]).then(() => this.results.delete(name))
    return result
  }
}

export interface HealthOptions {
  /**
   * All instances share the stores. If one is away, the probe names it and still succeeds: instances that were taken out of
   * the balancer could neither answer 503 with a `Retry-After` nor, while only Postgres is away, go on with sessions.
   */
  storeChecks: StoreChecks
  /** Whether the users table was there at the last check. */
  hasSchema: () => boolean
}

/** The probes of orchestrators and balancers, at the root. */
export const healthRoutes: FastifyPluginAsync<HealthOptions> = async (fastify, { storeChecks, hasSchema }) => {
  fastify.route({
    method: 'GET',
    url: '/health/live',
    schema: { tags: ['health'], operationId: 'live', summary: 'Whether the process lives' },
    config: { isProbe: true, outcomes: ['healthy', 'busy'] },
    handler: async (_request, reply) => reply.outcome('healthy')
  })
  fastify.route({
    method: 'GET',
    url: '/health/ready',
    schema: {
      tags: ['health'],
      operationId: 'ready',
      summary: 'Whether this instance can serve, and which stores are away'
    },
    config: { isProbe: true, outcomes: ['healthy', 'busy'], data: { healthy: FailingData, busy: FailingData } },
    handler: ready
  })

  async function ready(_request: FastifyRequest, reply: FastifyReply) {
    const failing = await storeChecks.failing()
    const failure = ownFailure()
    if (failure !== undefined) return reply.outcome('busy', { data: { failing: [failure] } })
    return reply.outcome('healthy', { data: { failing } })
  }

  /** Returns why this instance alone cannot serve. */
  function ownFailure(): string | undefined {
    const { isStarted, isEnding } = fastify.lifecycle
    if (isEnding) return 'shutting down'
    if (!isStarted) return 'starting'
    return hasSchema() ? undefined : 'no schema'
  }
}
