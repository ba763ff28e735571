import { fileURLToPath } from 'node:url'
import { runner } from 'node-pg-migrate'
import pg from 'pg'

/** Not the default of node-pg-migrate: another application in the same database may use that. */
const migrationsTable = 'mobile_signup_migrations'

/** A random number. All applications share the one of node-pg-migrate, and fail while another one has it. */
const lockId = 4_931_667_203_518_772

/**
 * Applies the pending migrations of `sql/`, each in a transaction of its own. With an advisory lock, instances that
 * start together take turns.
 *
 * @returns the names of the migrations that this call has applied
 * @throws {Error} which says what to do, if the schema has a table `users` of another application
 */
export async function migrate(databaseUrl: string): Promise<string[]> {
  const client = new pg.Client(databaseUrl)
  // The statement in progress rejects, too. An `error` event without a listener ends the process.
  client.on('error', () => undefined)
  await client.connect()
  try {
    // The end of the connection releases it.
    await client.query('SELECT pg_advisory_lock($1)', [lockId])
    const applied = await runner({
      dbClient: client,
      dir: fileURLToPath(new URL('../../sql', import.meta.url)),
      direction: 'up',
      migrationsTable,
      migrationsSchema: await findSchema(client),
      noLock: true,
      log: () => undefined
    })
    return applied.map(({ name }) => name)
  } finally {
    await client.end()
  }
}

interface Found {
  /** Where CREATE TABLE creates, or null if the search_path names no schema that exists. */
  schema: string | null
  /** Each is a name that can stand in a statement, or null. */
  users: string | null
  migrations: string | null
}

/** Returns the schema of the migrations. @throws if it has a table `users` that they have not created */
async function findSchema(client: pg.Client): Promise<string> {
  const { rows } = await client.query<Found>(
    `SELECT current_schema() AS schema,
            to_regclass(quote_ident(current_schema()) || '.users')::text AS users,
            to_regclass(quote_ident(current_schema()) || '.${migrationsTable}')::text AS migrations`
  )
  const { schema, users, migrations } = rows[0] ?? {}
  if (!schema) throw new Error('the search_path of DATABASE_URL names no schema that exists: create it')
  const applied = migrations ? await client.query(`SELECT name FROM ${migrations}`) : undefined
  if (!users || applied?.rowCount) return schema
  throw new Error(
    `the schema ${schema} has a table users of another application: use another database, or ` +
      'CREATE SCHEMA mobile_signup and append ?options=-c%20search_path%3Dmobile_signup to DATABASE_URL'
  )
}
