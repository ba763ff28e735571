import { setTimeout as sleep } from 'node:timers/promises'
import fastifyPostgres from '@fastify/postgres'
import fp from 'fastify-plugin'
import pg, { type ClientConfig, type QueryConfig, type QueryResult, type QueryResultRow } from 'pg'
import type { Config } from '../config/config.js'
import { Refusal } from '../outcomes.js'
import { redactError } from '../telemetry/log.js'
import { type Observer, observeRoundTrip } from '../telemetry/observer.js'
import { CircuitBreaker } from './circuit-breaker.js'
import { waitForStore } from './wait-for-store.js'

/** A prepared statement: it is parsed and planned once for each connection. */
export type NamedStatement = Required<Pick<QueryConfig, 'name' | 'text'>>

interface Postgres {
  /**
   * Runs a prepared statement in one round trip on a pooled connection.
   *
   * @throws {Refusal} `storage_unavailable` if Postgres fails or does not answer within `STORE_TIMEOUT_MS`
   */
  query<Row extends QueryResultRow>(statement: NamedStatement, values: unknown[]): Promise<QueryResult<Row>>
  /** @throws {Refusal} `storage_unavailable` while Postgres is known not to answer */
  assertAvailable(): void
  /** Counts the connections of the pool, the idle ones, and the statements that wait for one. */
  connections(): { total: number; idle: number; waiting: number }
  /** Checks that Postgres answers. */
  ping(): Promise<unknown>
}

declare module 'fastify' {
  interface FastifyInstance {
    postgres: Postgres
  }
}

/** A name of its own, because a host application may have registered @fastify/postgres, too. */
const poolName = 'mobileSignup'

/** The longest pause between two probes of a Postgres that does not answer. */
const probeIntervalMaxMs = 1_000

const selectOne: NamedStatement = { name: 'ping', text: 'SELECT 1' }

export const postgres = fp<{ config: Config; observer?: Observer | undefined }>(
  async (fastify, { config: { databaseUrl, pgPoolMax, storeTimeoutMs }, observer }) => {
    const connection = {
      connectionString: databaseUrl,
      application_name: 'mobile-signup',
      connectionTimeoutMillis: storeTimeoutMs,
      query_timeout: storeTimeoutMs,
      statement_timeout: storeTimeoutMs
    }
    await fastify.register(fastifyPostgres, { ...connection, name: poolName, max: pgPoolMax })
    const pool = fastify.pg[poolName]?.pool
    if (pool === undefined) throw new Error('@fastify/postgres created no pool')

    // Without this listener, an idle connection that fails ends the process.
    pool.on('error', (err) => fastify.log.warn({ err }, 'an idle Postgres connection failed'))

    await waitForStore('Postgres', () => pool.query(selectOne.text))

    // While Postgres does not answer, every statement would wait for its timeout. After a connection-level failure (not an
    // SQL error) a separate connection probes Postgres. If the probe fails, too, statements fail at once until one succeeds.
    const breaker = new CircuitBreaker({
      failuresToOpen: 1,
      // An SQL error, such as too many connections, is an answer.
      isFailure: (error) => !(error instanceof pg.DatabaseError)
    })
    let lastProbeError: unknown
    let isProbing = false
    let isClosed = false
    fastify.addHook('onClose', async () => {
      isClosed = true
    })
    async function probeUntilAvailable(): Promise<void> {
      if (isProbing) return
      isProbing = true
      while (!isClosed) {
        await breaker
          .execute(() => probe(connection))
          .catch((error) => {
            lastProbeError = error
          })
        if (!breaker.isOpen) break
        await sleep(Math.random() * probeIntervalMaxMs, undefined, { ref: false })
      }
      isProbing = false
    }

    function assertAvailable(): void {
      if (breaker.isOpen) throw new Refusal('storage_unavailable', redactError(lastProbeError))
    }

    const query = async <Row extends QueryResultRow>(statement: NamedStatement, values: unknown[]) => {
      assertAvailable()
      try {
        return await observeRoundTrip(observer, 'postgres', pool.query<Row>({ ...statement, values }))
      } catch (cause) {
        if (!(cause instanceof pg.DatabaseError)) probeUntilAvailable()
        throw new Refusal('storage_unavailable', redactError(cause))
      }
    }

    fastify.decorate('postgres', {
      query,
      assertAvailable,
      connections: () => ({ total: pool.totalCount, idle: pool.idleCount, waiting: pool.waitingCount }),
      ping: () => query(selectOne, [])
    } satisfies Postgres)
  },
  { fastify: '5.x', name: 'postgres' }
)

/** @throws if Postgres does not answer on a new connection */
async function probe(connection: ClientConfig): Promise<void> {
  const client = new pg.Client(connection)
  // Without this listener, an error after the probe ends the process.
  client.on('error', () => undefined)
  try {
    await client.connect()
    await client.query(selectOne.text)
  } finally {
    client.end().catch(() => undefined)
  }
}
