import fastifyPostgres from '@fastify/postgres'
import fp from 'fastify-plugin'
import type { QueryConfig, QueryResult, QueryResultRow } from 'pg'
import type { Config } from '../config.js'
import { publicError } from '../logging.js'
import { Refusal } from '../replies.js'
import { waitForStore } from '../start-up.js'

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
  }
}

/** The service's own pool, beside any that a host application has registered. */
const poolName = 'mobileSignup'

export const postgres = fp<Pick<Config, 'databaseUrl' | 'pgPoolMax' | 'storeTimeoutMs'>>(
  async (fastify, { databaseUrl, pgPoolMax, storeTimeoutMs }) => {
    await fastify.register(fastifyPostgres, {
      name: poolName,
      connectionString: databaseUrl,
      application_name: 'mobile-signup',
      max: pgPoolMax,
      connectionTimeoutMillis: storeTimeoutMs,
      query_timeout: storeTimeoutMs,
      statement_timeout: storeTimeoutMs
    })
    const pool = fastify.pg[poolName]?.pool
    if (pool === undefined) throw new Error('@fastify/postgres made no pool')

    // Without a listener an idle connection that dies ends the process.
    pool.on('error', (err) => fastify.log.warn({ err }, 'an idle Postgres connection failed'))

    await waitForStore('Postgres', () => pool.query('SELECT 1'))

    fastify.decorate('sql', async <Row extends QueryResultRow>(statement: NamedStatement, values: unknown[]) => {
      try {
        return await pool.query<Row>({ ...statement, values })
      } catch (cause) {
        throw new Refusal('storage_unavailable', publicError(cause))
      }
    })
  },
  { fastify: '5.x', name: 'postgres' }
)
