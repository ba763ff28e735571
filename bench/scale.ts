import pg from 'pg'
import { migrate } from '../src/stores/migrations.js'
import { insertUser } from '../src/users/users.js'
import type { Lab } from './lab.js'
import { progress, type Row } from './report.js'
import { median, round } from './statistics.js'

const users = 10_000_000
const inserts = 600
const rounds = 5

const phc = '$argon2id$v=19$m=19456,t=2,p=1$AAAAAAAAAAAAAAAAAAAAAA$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA'

/** The nth of distinct mobiles in no order: 7,919 has no factor in common with 7,000,000,000. */
const mobileOf = 'SELECT (13000000000 + (n * 7919) % 7000000000)::text AS mobile FROM generate_series'

/** P8: an INSERT into a table of ten million users against one into an empty table. */
export async function scale(lab: Lab): Promise<Row[]> {
  const [empty, full] = [await database(lab, 'empty'), await database(lab, 'full')]
  progress(`scale: making ${users / 1e6} million users inside Postgres, about a minute`)
  await full.query(`
    ALTER TABLE users DROP CONSTRAINT users_pkey, DROP CONSTRAINT users_mobile_key;
    INSERT INTO users (name, mobile, password_hash) SELECT mobile, mobile, '${phc}' FROM (${mobileOf}(1::bigint, ${users}) n);
    ALTER TABLE users ADD PRIMARY KEY (id), ADD CONSTRAINT users_mobile_key UNIQUE (mobile);
  `)
  await full.query('VACUUM (ANALYZE) users')
  await full.query('CHECKPOINT')
  const { rows } = await full.query(
    `SELECT pg_table_size('users')::float8 AS "table", pg_relation_size('users_pkey')::float8 AS id,
            pg_relation_size('users_mobile_key')::float8 AS mobile`
  )

  const medians: { empty: number[]; full: number[] } = { empty: [], full: [] }
  for (let n = 0; n < rounds; n++) {
    progress(`scale: inserting, round ${n + 1} of ${rounds}`)
    const from = users + n * inserts + 1
    const mobiles = (await full.query(`${mobileOf}(${from}::bigint, ${from + inserts - 1}) n`)).rows.map(
      ({ mobile }) => mobile
    )
    medians.empty.push(await medianInsertMs(empty, mobiles))
    medians.full.push(await medianInsertMs(full, mobiles))
  }
  await Promise.all([empty.end(), full.end()])
  const [size] = rows
  return [
    {
      name: 'P8: an INSERT with 10 million users ÷ with none, median time',
      figure: median(medians.full) / median(medians.empty),
      target: { atMost: 1.3 },
      raw: { fullMs: medians.full.map(round), emptyMs: medians.empty.map(round) }
    },
    { name: 'bytes of a user in the table', figure: size.table / users, raw: size.table },
    { name: 'bytes of a user in the two indexes', figure: (size.id + size.mobile) / users, raw: [size.id, size.mobile] }
  ]
}

async function database(lab: Lab, name: string): Promise<pg.Client> {
  await lab.postgres.query(`CREATE DATABASE "${name}"`)
  const url = new URL(lab.stores.databaseUrl)
  url.pathname = `/${name}`
  await migrate(url.href)
  const client = new pg.Client(url.href)
  // What fails says so by itself; this is for the end of the stores after it.
  client.on('error', () => undefined)
  await client.connect()
  return client
}

async function medianInsertMs(client: pg.Client, mobiles: readonly string[]): Promise<number> {
  const times = []
  for (const mobile of mobiles) {
    const startedAt = performance.now()
    await client.query({ ...insertUser, values: [mobile, phc] })
    times.push(performance.now() - startedAt)
  }
  return median(times)
}
