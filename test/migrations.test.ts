import { execFile } from 'node:child_process'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import pg from 'pg'
import t from 'tap'
import { migrate } from '../dist/stores/migrations.js'
import { startTestbed } from '../testkit/testbed.js'

const { stores, postgres } = await startTestbed(t)

/** Creates an empty database, and returns its URL. */
async function createDatabase(name: string): Promise<string> {
  await postgres.query(`CREATE DATABASE ${name}`)
  const url = new URL(stores.databaseUrl)
  url.pathname = `/${name}`
  return url.href
}

t.test('parallel migrations of an empty database do not collide', async (t) => {
  const url = await createDatabase('parallel')
  const applied = await Promise.all(Array.from({ length: 8 }, () => migrate(url)))
  t.strictSame(applied.flat(), ['0001_users', '0002_session_epoch'], 'each migration is applied once')

  const client = new pg.Client(url)
  await client.connect()
  const { rows } = await client.query(
    `SELECT column_name, data_type, is_nullable FROM information_schema.columns
     WHERE table_name = 'users' ORDER BY ordinal_position`
  )
  await client.end()
  t.strictSame(
    rows.map((row) => Object.values(row).join(' ')),
    [
      'id bigint NO',
      'name text NO',
      'mobile text NO',
      'password_hash text NO',
      'created_at timestamp with time zone NO',
      'session_epoch integer NO'
    ]
  )
})

t.test('a migration fails with the reason of Postgres', async (t) => {
  await t.rejects(migrate(stores.databaseUrl.replace(/:[0-9a-f]+@/, ':wrong@')), /password authentication failed/)
})

t.test('the migrate command applies pending migrations and prints their names', async (t) => {
  const url = await createDatabase('by_command')
  const command = fileURLToPath(new URL('../dist/migrate.js', import.meta.url))
  const run = (env: Record<string, string>) => promisify(execFile)(process.execPath, [command], { env })

  t.equal((await run({ DATABASE_URL: url })).stdout, 'applied: 0001_users, 0002_session_epoch\n')
  t.equal((await run({ DATABASE_URL: url })).stdout, 'applied: nothing was pending\n')
  await t.rejects(run({}), {
    code: 1,
    stderr: /^migrate: invalid environment:\n {2}DATABASE_URL: is unset; expected a URL/
  })
})
