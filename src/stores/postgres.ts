import { setTimeout as sleep } from 'node:timers/promises'
import fastifyPostgres from '@fastify/postgres'
import type { FastifyInstance } from 'fastify'
import pg, { type ClientConfig, type QueryConfig, type QueryResultRow } from 'pg'
import { parseIntoClientConfig } from 'pg-connection-string'
import type { Config } from '../config/config.js'
import { type Observer, observeRoundTrip } from '../telemetry/observer.js'
import { sampledWarnings } from '../telemetry/sampled-warnings.js'
import { PoolConnections } from './pool-connections.js'
import { isProgrammingError, StoreUnavailable } from './store-unavailable.js'
import { waitForStore } from './wait-for-store.js'

/** A statement with a name is prepared: each connection parses and plans it once. */
export type Statement = Pick<QueryConfig, 'name' | 'text'>

export type Postgres = Awaited<ReturnType<typeof openPostgres>>

/** A name of its own, because a host application may have registered @fastify/postgres, too. */
const poolName = 'mobileSignup'

/** The longest pause between two probes of a Postgres that does not answer. */
const probeIntervalMaxMs = 1_000

const selectOne: Statement = { name: 'select_one', text: 'SELECT 1' }

const readState: Statement = {
  name: 'read_state',
  text: `SELECT current_setting('transaction_read_only') = 'on' AS "isReadOnly", to_regclass('users') IS NOT NULL AS "hasSchema"`
}

/**
 * Connects to Postgres with @fastify/postgres, whose pool ends with the application.
 *
 * @throws if Postgres does not answer within 10 s
 */
export async function openPostgres(
  fastify: FastifyInstance,
  { databaseUrl, pgPooler, pgPoolMax, storeTimeoutMs }: Config,
  observer: Observer | undefined
) {
  // A transaction pooler gives each statement another connection to Postgres. So it knows no prepared statement of ours, and
  // it refuses `statement_timeout` as a startup parameter.
  const hasPooler = pgPooler === 'transaction'
  const connection = {
    application_name: 'mobile-signup',
    connectionTimeoutMillis: storeTimeoutMs,
    query_timeout: storeTimeoutMs,
    ...(!hasPooler && { statement_timeout: storeTimeoutMs }),
    // Parsed once, because this reads the files of certificates. From a `connectionString`, node-postgres reads them for each
    // connection. A file that cannot be read then ends the process when the pool connects again by itself.
    ...parseIntoClientConfig(databaseUrl)
  }
  await fastify.register(fastifyPostgres, { ...connection, name: poolName, max: pgPoolMax })
  const pool = fastify.pg[poolName]?.pool
  if (pool === undefined) throw new Error('@fastify/postgres created no pool')

  const warn = sampledWarnings(fastify.log)
  // An `error` event without a listener ends the process. The pool emits the errors of its idle connections. A
  // connection in use emits its own.
  pool.on('error', (err) => warn(err, 'an idle Postgres connection failed'))
  pool.on('connect', (client) => client.on('error', () => undefined))
  const connections = new PoolConnections(pool, pgPoolMax, storeTimeoutMs, (err) =>
    warn(err, 'no Postgres connection can be opened')
  )
  /** How many statements have succeeded. */
  let successCount = 0

  /** @param check throws if the rows show that the connection must not be used again */
  async function runOnPool<Row extends QueryResultRow>(
    { name, text }: Statement,
    values: unknown[],
    check?: (rows: Row[]) => void
  ) {
    // One deadline for the wait for a connection, which has the same timeout, and for the query.
    const deadline = performance.now() + storeTimeoutMs
    const client = await connections.take()
    try {
      // `query_timeout` works for each query, but @types/pg lacks it there. 0 would mean the default, the whole timeout.
      const query_timeout = Math.max(1, deadline - performance.now())
      const query = { ...(!hasPooler && { name }), text, values, query_timeout }
      const result = await client.query<Row>(query)
      check?.(result.rows)
      successCount++
      connections.release(client, true)
      return result
    } catch (error) {
      connections.release(client, isUsableAfter(error))
      throw error
    }
  }

  await waitForStore('Postgres', async () => {
    // First outside the pool: its end waits for a connection that is being opened, so a start that fails would also take
    // STORE_TIMEOUT_MS.
    await connectOnce(connection)
    await pool.query('SELECT 1')
  })
  // While Postgres does not answer, every statement would wait for its timeout. After a connection-level failure (not an
  // SQL error) a separate connection and an idle one of the pool probe Postgres. If both fail, and no statement succeeds
  // meanwhile, statements fail at once until a probe succeeds.
  /** Why the last probe failed. Undefined while Postgres answers. */
  let probeError: unknown
  let isProbing = false
  let isClosed = false
  fastify.addHook('onClose', async () => {
    isClosed = true
  })
  const probeUntilAvailable = async (): Promise<void> => {
    if (isProbing) return
    isProbing = true
    while (!isClosed) {
      const wasAway = probeError !== undefined
      const formerCount = successCount
      const probes = [probe(connection), ...(pool.idleCount > 0 ? [runOnPool(selectOne, [])] : [])]
      const failure = await Promise.any(probes).then(
        () => undefined,
        ({ errors }: AggregateError) => errors[0]
      )
      probeError = successCount > formerCount ? undefined : failure
      if (probeError === undefined) {
        if (wasAway) fastify.log.info('Postgres answers again')
        break
      }
      if (!wasAway) fastify.log.warn({ err: probeError }, 'Postgres does not answer')
      await sleep(Math.random() * probeIntervalMaxMs, undefined, { ref: false })
    }
    isProbing = false
  }

  /** @throws {StoreUnavailable} while Postgres is known not to answer */
  function assertAvailable(): void {
    if (probeError !== undefined) throw new StoreUnavailable('postgres', probeError)
  }

  /**
   * Runs a statement in one round trip on a pooled connection.
   *
   * @throws {StoreUnavailable} if Postgres cannot serve now, or does not answer within `STORE_TIMEOUT_MS`
   * @throws {Error} the error of Postgres itself, if it shows a bug, such as a missing right
   */
  async function query<Row extends QueryResultRow>(
    statement: Statement,
    values: unknown[],
    check?: (rows: Row[]) => void
  ) {
    assertAvailable()
    try {
      return await observeRoundTrip(observer, 'postgres', runOnPool<Row>(statement, values, check))
    } catch (error) {
      if (!isOutage(error)) throw error
      if (!(error instanceof pg.DatabaseError)) probeUntilAvailable()
      warn(error, 'a round trip to Postgres failed')
      throw new StoreUnavailable('postgres', error)
    }
  }

  let hasSchema = true
  return {
    query,
    assertAvailable,
    /** Counts the connections of the pool, the idle ones, and the statements that wait for one. */
    connections: () => ({ total: pool.totalCount, idle: pool.idleCount, waiting: connections.waitingCount }),
    /** Whether the last check has found the users table. */
    get hasSchema() {
      return hasSchema
    },
    /** @throws if Postgres does not answer, or is read-only */
    async checkWritable(): Promise<void> {
      await query<{ isReadOnly: boolean; hasSchema: boolean }>(readState, [], ([row]) => {
        if (row?.isReadOnly) throw new Error('Postgres is read-only')
        hasSchema = row?.hasSchema ?? true
      })
    }
  }
}

/**
 * The SQLSTATEs of an outage: a failed connection (08), a rolled back transaction (40), exhausted resources (53), an operator
 * or a timeout (57), and a server that is read-only, so no longer the primary (25006).
 */
const outageStates = /^(08|40|53|57|25006)/

/**
 * Whether a retry may succeed without a change of Postgres or of this service. Any other SQL error is a bug: a missing right,
 * column or table. The other errors of node-postgres are lost connections and timeouts, mostly of class `Error`.
 */
function isOutage(error: unknown): error is Error {
  if (!(error instanceof Error)) return false
  return error instanceof pg.DatabaseError ? outageStates.test(error.code ?? '') : !isProgrammingError(error)
}

/**
 * The SQL errors after which a connection must not be used again: Postgres ends it (57P01 to 57P05, class 08), the server is
 * read-only and so no longer the primary (25006), or a prepared statement of the connection would fail again each time
 * (0A000 after a change of the table, 26000, 42P05).
 */
const unusableAfter = /^(57P|08|25006|0A000|26000|42P05)/

/**
 * Whether a connection can be used again after an error. An SQL error leaves it usable. If each of them cost a connection,
 * errors of one part of the database would become a storm of reconnections.
 */
function isUsableAfter(error: unknown): boolean {
  return error instanceof pg.DatabaseError && !unusableAfter.test(error.code ?? '')
}

/** @throws if Postgres does not answer on a new connection */
async function probe(connection: ClientConfig): Promise<void> {
  await connectOnce(connection).catch((error) => {
    // An SQL error, such as too many connections, is an answer.
    if (!(error instanceof pg.DatabaseError)) throw error
  })
}

async function connectOnce(connection: ClientConfig): Promise<void> {
  const client = new pg.Client(connection)
  // Without this listener, an error after the end of this function ends the process.
  client.on('error', () => undefined)
  try {
    await client.connect()
    await client.query('SELECT 1')
  } finally {
    client.end().catch(() => undefined)
  }
}
