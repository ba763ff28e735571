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
  /** The names of all stores. */
  readonly names: readonly string[]
  private readonly checks: readonly StoreCheck[]

  constructor(checks: Record<string, () => Promise<unknown>>) {
    this.names = Object.keys(checks)
    this.checks = Object.values(checks).map((check) => new StoreCheck(check))
  }

  /** Returns the names of the stores that fail, or do not answer within half a second. */
  async failing(): Promise<string[]> {
    const results = await Promise.all(this.checks.map((check) => check.hasFailed()))
    return this.names.filter((_, index) => results[index])
  }
}

/** The check of one store, which runs at most once at a time, and at most once a second. */
class StoreCheck {
  private lastResult: Promise<boolean> | undefined
  private lastStartAt = Number.NEGATIVE_INFINITY
  private isRunning = false

  constructor(private readonly check: () => Promise<unknown>) {}

  hasFailed(): Promise<boolean> {
    if (!this.isRunning && performance.now() - this.lastStartAt > maxAgeMs) this.lastResult = this.run()
    return Promise.race([this.lastResult ?? true, sleep(patienceMs, true, { ref: false })])
  }

  private async run(): Promise<boolean> {
    this.isRunning = true
    this.lastStartAt = performance.now()
    try {
      await this.check()
      return false
    } catch {
      return true
    } finally {
      this.isRunning = false
    }
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
    config: { isProbe: true, outcomes: ['healthy', 'busy'] },
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
      isProbe: true,
      outcomes: ['healthy', 'busy'],
      data: { healthy: FailingData, busy: FailingData }
    },
    handler: ready
  })

  async function live(_request: FastifyRequest, reply: FastifyReply) {
    return reply.outcome('healthy')
  }

  async function ready(_request: FastifyRequest, reply: FastifyReply) {
    const failing = await storeChecks.failing()
    const failure = ownFailure()
    if (failure !== undefined) return reply.outcome('busy', { data: { failing: [failure] } })
    return reply.outcome('healthy', { data: { failing } })
  }
}
