import { hash } from '@node-rs/argon2'
import pg from 'pg'
import { migrate } from '#src/stores/migrations.js'
import { insertUser } from '#src/users/users.js'
import { alternate } from './alternate.js'
import { type Row, showProgress } from './report.js'
import { median, round } from './statistics.js'
import type { SystemUnderTest } from './system-under-test.js'

const userCount = 10_000_000
const rounds = 5
const insertsPerRound = 600

/**
 * Selects distinct mobiles in no order, as real ones arrive: 7,919 and 7,000,000,000 have no common factor. The arguments of
 * `generate_series` follow.
 */
const selectMobiles = 'SELECT (13000000000 + (n * 7919) % 7000000000)::text AS mobile FROM generate_series'

/** P8: an INSERT into a table of ten million users, compared with one into an empty table. */
export async function insertScale(system: SystemUnderTest): Promise<Row[]> {
  const phc = await hash('a bench password')
  const [empty, full] = [await createDatabase(system, 'empty'), await createDatabase(system, 'full')]
  try {
    showProgress(`scale: creating ${userCount / 1e6} million users in Postgres, which takes about a minute`)
    await fill(full, phc)
    const size = await measureSize(full)

    const firstNew = userCount + 1
    const lastNew = userCount + rounds * insertsPerRound
    const { rows } = await full.query<{ mobile: string }>(`${selectMobiles}(${firstNew}::bigint, ${lastNew}) n`)
    const measureInserts = (database: pg.Client, round: number) =>
      medianInsertMs(database, phc, rows.slice(round * insertsPerRound, (round + 1) * insertsPerRound))
    const times = await alternate(
      rounds,
      (round) => measureInserts(empty, round),
      (round) => measureInserts(full, round),
      'scale: inserts'
    )
    const [emptyMs, fullMs] = [times.map(([ms]) => ms), times.map(([, ms]) => ms)]
    return [
      {
        name: 'P8: an INSERT with 10 million users ÷ with none, median time',
        figure: median(fullMs) / median(emptyMs),
        target: { atMost: 1.3 },
        raw: { fullMs: fullMs.map(round), emptyMs: emptyMs.map(round) }
      },
      { name: 'bytes of a user in the table', figure: size.table / userCount, raw: size.table },
      {
        name: 'bytes of a user in the two indexes',
        figure: (size.id + size.mobile) / userCount,
        raw: [size.id, size.mobile]
      }
    ]
  } finally {
    await Promise.all([empty.end(), full.end()])
  }
}

async function createDatabase({ stores }: SystemUnderTest, name: string): Promise<pg.Client> {
  await stores.postgres.query(`CREATE DATABASE "${name}"`)
  const url = new URL(stores.databaseUrl)
  url.pathname = `/${name}`
  await migrate(url.href)
  const client = new pg.Client(url.href)
  // A failed query rejects. The event comes without a query, for example when Postgres stops first.
  client.on('error', () => undefined)
  await client.connect()
  return client
}

/** Creates the users without the indexes and adds those afterwards, which is faster. */
async function fill(database: pg.Client, phc: string): Promise<void> {
  await database.query(`
    ALTER TABLE users DROP CONSTRAINT users_pkey, DROP CONSTRAINT users_mobile_key;
    INSERT INTO users (name, mobile, password_hash)
      SELECT mobile, mobile, '${phc}' FROM (${selectMobiles}(1::bigint, ${userCount}) n);
    ALTER TABLE users ADD PRIMARY KEY (id), ADD CONSTRAINT users_mobile_key UNIQUE (mobile);
  `)
  await database.query('VACUUM (ANALYZE) users')
  await database.query('CHECKPOINT')
}

interface Size {
  table: number
  id: number
  mobile: number
}

/** Returns the sizes of the users table and of its two indexes, in bytes. */
async function measureSize(database: pg.Client): Promise<Size> {
  const { rows } = await database.query<Size>(
    `SELECT pg_table_size('users')::float8 AS "table", pg_relation_size('users_pkey')::float8 AS id,
            pg_relation_size('users_mobile_key')::float8 AS mobile`
  )
  const [size] = rows
  if (size === undefined) throw new Error('the query for the size returned no row')
  return size
}

async function medianInsertMs(database: pg.Client, phc: string, users: readonly { mobile: string }[]): Promise<number> {
  const times = []
  for (const { mobile } of users) {
    const startedAt = performance.now()
    await database.query({ ...insertUser, values: [mobile, phc] })
    times.push(performance.now() - startedAt)
  }
  return median(times)
}
