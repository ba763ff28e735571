import { setTimeout as sleep } from 'node:timers/promises'
import fastifyPostgres from '@fastify/postgres'
import fp from 'fastify-plugin'
import pg, { type ClientConfig, type QueryConfig, type QueryResult, type QueryResultRow } from 'pg'
import type { Config } from '../config/config.js'
import { Refusal } from '../outcomes.js'
import { publicError } from '../telemetry/log.js'
import { waitForStore } from './wait-for-store.js'

/** A statement with a name is parsed and planned once for each connection. */
export type NamedStatement = Required<Pick<QueryConfig, 'name' | 'text'>>

declare module 'fastify' {
  interface FastifyInstance {
    /**
     * Runs a named prepared statement in one round trip on a pooled connection.
     *
     * @throws {Refusal} `storage_unavailable` when Postgres fails or does not answer in `STORE_TIMEOUT_MS`
     */
    sql<Row extends QueryResultRow>(statement: NamedStatement, values: unknown[]): Promise<QueryResult<Row>>
    /** @throws {Refusal} `storage_unavailable` while Postgres is known not to answer */
    requirePostgres(): void
    /** The pool's connections, those of them that are idle, and what waits for one. */
    poolUse(): { total: number; idle: number; waiting: number }
  }
}

/** The service's own pool, beside any that a host application has registered. */
const poolName = 'mobileSignup'

/** The longest pause between two tries whether Postgres answers again. */
const retryMaxMs = 1_000

export const postgres = fp<Pick<Config, 'databaseUrl' | 'pgPoolMax' | 'storeTimeoutMs'>>(
  async (fastify, { databaseUrl, pgPoolMax, storeTimeoutMs }) => {
    const connection = {
      connectionString: databaseUrl,
      application_name: 'mobile-signup',
      connectionTimeoutMillis: storeTimeoutMs,
      query_timeout: storeTimeoutMs,
      statement_timeout: storeTimeoutMs
    }
    await fastify.register(fastifyPostgres, { ...connection, name: poolName, max: pgPoolMax })
    const pool = fastify.pg[poolName]?.pool
    if (pool === undefined) throw new Error('@fastify/postgres made no pool')

    // Without a listener an idle connection that dies ends the process.
    pool.on('error', (err) => fastify.log.warn({ err }, 'an idle Postgres connection failed'))

    await waitForStore('Postgres', () => pool.query('SELECT 1'))

    // While Postgres does not answer, each statement would wait for its timeout. So after a failure that Postgres did not
    // tell itself, a connection beside the pool tries whether it answers; until it does, statements fail at once.
    let unanswering: unknown
    let trying = false
    let closed = false
    fastify.addHook('onClose', async () => {
      closed = true
    })
    async function tryConnection(): Promise<void> {
      if (trying) return
      trying = true
      while (!closed) {
        unanswering = await failureOf(connection)
        if (unanswering === undefined) break
        await sleep(Math.random() * retryMaxMs, undefined, { ref: false })
      }
      trying = false
    }

    function requirePostgres(): void {
      if (unanswering !== undefined) throw new Refusal('storage_unavailable', publicError(unanswering))
    }
    fastify.decorate('requirePostgres', requirePostgres)
    fastify.decorate('poolUse', () => ({
      total: pool.totalCount,
      idle: pool.idleCount,
      waiting: pool.waitingCount
    }))
    fastify.decorate('sql', async <Row extends QueryResultRow>(statement: NamedStatement, values: unknown[]) => {
      requirePostgres()
      try {
        const trip = pool.query<Row>({ ...statement, values })
        fastify.metrics?.observeRoundTrip('postgres', trip)
        return await trip
      } catch (cause) {
        if (!(cause instanceof pg.DatabaseError)) tryConnection()
        throw new Refusal('storage_unavailable', publicError(cause))
      }
    })
  },
  { fastify: '5.x', name: 'postgres' }
)

/** Why Postgres does not answer; undefined if it does. */
async function failureOf(connection: ClientConfig): Promise<unknown> {
  const client = new pg.Client(connection)
  // It has an end of its own below.
  client.on('error', () => undefined)
  try {
    await client.connect()
    await client.query('SELECT 1')
    return undefined
  } catch (error) {
    // What Postgres tells itself, as that it has no connection left, is an answer.
    return error instanceof pg.DatabaseError ? undefined : error
  } finally {
    client.end().catch(() => undefined)
  }
}
