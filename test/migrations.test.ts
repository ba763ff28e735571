import { execFile } from 'node:child_process'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import pg from 'pg'
import t from 'tap'
import { migrate } from '../src/stores/migrations.js'
import { postgres, stores } from './helper.js'

t.test('instances that start at once on an empty database do not collide', async (t) => {
  await postgres.query('CREATE DATABASE empty')
  const url = new URL(stores.databaseUrl)
  url.pathname = '/empty'
  const applied = await Promise.all(Array.from({ length: 8 }, () => migrate(url.href)))
  t.strictSame(applied.flat(), ['0001_users'], 'one of them applies each migration, once')

  const client = new pg.Client(url.href)
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
      'created_at timestamp with time zone NO'
    ]
  )
})

t.test('a database that refuses is an error with its reason', async (t) => {
  await t.rejects(migrate(stores.databaseUrl.replace(/:[0-9a-f]+@/, ':wrong@')), /password authentication failed/)
})

t.test('npm run migrate applies what is pending and says so', async (t) => {
  await postgres.query('CREATE DATABASE another')
  const url = new URL(stores.databaseUrl)
  url.pathname = '/another'
  const command = fileURLToPath(new URL('../dist/migrate.js', import.meta.url))
  const run = (env: Record<string, string>) => promisify(execFile)(process.execPath, [command], { env })

  t.equal((await run({ DATABASE_URL: url.href })).stdout, 'applied: 0001_users\n')
  t.equal((await run({ DATABASE_URL: url.href })).stdout, 'applied: nothing, all migrations were there\n')
  await t.rejects(run({}), { code: 1, stderr: /^migrate: .*\n {2}DATABASE_URL: .*expected a URL/ })
})
