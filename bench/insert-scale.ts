import { hash } from '@node-rs/argon2'
import pg from 'pg'
import { migrate } from '#src/stores/migrations.js'
import { insertUser } from '#src/users/users.js'
import { alternate } from './alternate.js'
import { type Row, ratioRow, showProgress } from './report.js'
import { median } from './statistics.js'
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
export async function insertScale({ stores }: SystemUnderTest): Promise<Row[]> {
  const phc = await hash('a bench password')

  async function createDatabase(name: string): Promise<pg.Client> {
    const url = await stores.createDatabase(name)
    await migrate(url)
    const client = new pg.Client(url)
    await client.connect()
    return client
  }

  async function medianInsertMs(database: pg.Client, users: readonly { mobile: string }[]): Promise<number> {
    const times = []
    for (const { mobile } of users) {
      const startedAt = performance.now()
      await database.query({ ...insertUser(false), values: [mobile, phc] })
      times.push(performance.now() - startedAt)
    }
    return median(times)
  }

  const [empty, full] = [await createDatabase('empty'), await createDatabase('full')]
  try {
    showProgress(`scale: creating ${userCount / 1e6} million users in Postgres, which takes about a minute`)
    // To add the indexes afterwards is faster.
    await full.query(`
      ALTER TABLE users DROP CONSTRAINT users_pkey, DROP CONSTRAINT users_mobile_key;
      INSERT INTO users (name, mobile, password_hash)
        SELECT mobile, mobile, '${phc}' FROM (${selectMobiles}(1::bigint, ${userCount}) n);
      ALTER TABLE users ADD PRIMARY KEY (id), ADD CONSTRAINT users_mobile_key UNIQUE (mobile);
    `)
    for (const statement of ['VACUUM (ANALYZE) users', 'CHECKPOINT']) await full.query(statement)
    const lastNew = userCount + rounds * insertsPerRound
    const { rows } = await full.query(`${selectMobiles}(${userCount + 1}::bigint, ${lastNew}) n`)
    const users = (round: number) => rows.slice(round * insertsPerRound, (round + 1) * insertsPerRound)
    const times = await alternate(
      'scale: inserts',
      rounds,
      (round) => medianInsertMs(full, users(round)),
      (round) => medianInsertMs(empty, users(round))
    )
    return [ratioRow('P8: an INSERT with 10 million users ÷ with none, median time', times, { atMost: 1.3 })]
  } finally {
    await Promise.all([empty.end(), full.end()])
  }
}
