import { execFile } from 'node:child_process'
import { readFile, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { PG_MIGRATE_LOCK_ID, runner } from 'node-pg-migrate'
import pg from 'pg'
import t from 'tap'
import { migrate } from '#src/stores/migrations.js'
import { client } from '../testkit/client.js'
import { queryOnce } from '../testkit/postgres-admin.js'
import { createTemporaryFolder } from '../testkit/temporary-folder.js'
import { startTestbed } from '../testkit/testbed.js'

const { build, cookieOf, newMobile, postgres, signUpBody, stores } = await startTestbed(t)

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
  t.strictSame(applied.flat(), ['0001_users'], 'each migration is applied once')

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

t.test('G2: an id has the time, so it is new although the counter goes back, as after a failover', async (t) => {
  const idOf = async () => {
    const { rows } = await postgres.query(
      `INSERT INTO users (name, mobile, password_hash) VALUES ('n', $1, 'h') RETURNING id`,
      [newMobile()]
    )
    return BigInt(rows[0].id)
  }
  await postgres.query(`SELECT setval('user_id_counter', 4194302)`)
  const ids = [await idOf(), await idOf(), await idOf()]
  await postgres.query(`SELECT setval('user_id_counter', 4194302)`)
  ids.push(await idOf(), await idOf())
  t.equal(new Set(ids).size, ids.length)
  t.strictSame(
    ids.map((id) => id & 4_194_303n),
    [4_194_303n, 0n, 1n, 4_194_303n, 0n],
    'the counter wraps'
  )
  for (const id of ids) {
    const ageMs = Date.now() - (Number(id >> 22n) + Date.UTC(2024))
    t.ok(Math.abs(ageMs) < 300_000, 'the rest is the time in milliseconds since 2024')
  }
})

t.test('an id does not tell how many users there are: the counter of each database begins elsewhere', async (t) => {
  const counters = new Set<string>()
  for (const name of ['first', 'second', 'third']) {
    const url = await createDatabase(name)
    await migrate(url)
    for (const { last_value } of await queryOnce(url, 'SELECT last_value FROM user_id_counter'))
      counters.add(last_value)
  }
  t.equal(counters.size, 3)
})

t.test('G2: on Citus an id has the node, too, and a node that does not fit is an error', async (t) => {
  const citusSql = await readFile(new URL('../deploy/citus.sql', import.meta.url), 'utf8')
  const [createFunction = ''] = /^CREATE FUNCTION[\s\S]*?^\$\$;$/m.exec(citusSql) ?? []
  await postgres.query(createFunction)
  const idOf = async (counter: bigint) => {
    const { rows } = await postgres.query('SELECT make_user_id($1) AS id', [`${counter}`])
    return BigInt(rows[0].id)
  }
  // Node group g counts from g * 2^48 + 1. The coordinator counts as on a single Postgres.
  const startOf = (group: bigint) => group << 48n
  for (const [counter, group, shortCounter] of [
    [0n, 0n, 0n],
    [4_194_303n, 0n, 65_535n],
    [startOf(1n) + 1n, 1n, 1n],
    [startOf(2n) + 65_537n, 2n, 1n],
    [startOf(63n) + 131_071n, 63n, 65_535n]
  ] as const) {
    const id = await idOf(counter)
    t.strictSame([(id >> 16n) & 63n, id & 65_535n], [group, shortCounter], `${counter}`)
    const ageMs = Date.now() - (Number(id >> 22n) + Date.UTC(2024))
    t.ok(ageMs > -1_000 && ageMs < 60_000, `${ageMs} ms`)
  }
  await t.rejects(idOf(startOf(64n)), /node group 64/)
})

t.test('a role that may only use the table can insert users', async (t) => {
  const url = await createDatabase('restricted')
  await migrate(url)
  const client = new pg.Client(url)
  await client.connect()
  t.teardown(() => client.end())
  await client.query('CREATE ROLE restricted; GRANT SELECT, INSERT ON users TO restricted; SET ROLE restricted')
  const { rows } = await client.query(
    `INSERT INTO users (name, mobile, password_hash) VALUES ('n', '1', 'h') RETURNING id`
  )
  t.match(rows, [{ id: /^\d{15,19}$/ }])
})

t.test('another application that uses node-pg-migrate works in the same database, before and after', async (t) => {
  const dir = createTemporaryFolder()
  t.teardown(() => rm(dir, { recursive: true }))
  await writeFile(join(dir, '0001_orders.sql'), 'CREATE TABLE orders (id integer);')
  /** With the defaults of its command. */
  const migrateOther = async (databaseUrl: string) => {
    const applied = await runner({ databaseUrl, dir, direction: 'up', migrationsTable: 'pgmigrations', log: () => {} })
    return applied.map(({ name }) => name)
  }

  const before = await createDatabase('other_before')
  t.strictSame(await migrateOther(before), ['0001_orders'])
  t.strictSame(await migrate(before), ['0001_users'])

  const after = await createDatabase('other_after')
  t.strictSame(await migrate(after), ['0001_users'])
  t.strictSame(await migrateOther(after), ['0001_orders'])

  for (const url of [before, after]) {
    t.strictSame([await migrate(url), await migrateOther(url)], [[], []], 'nothing is pending')
  }

  const meanwhile = await createDatabase('other_meanwhile')
  const other = new pg.Client(meanwhile)
  await other.connect()
  t.teardown(() => other.end())
  await other.query('SELECT pg_advisory_lock($1)', [PG_MIGRATE_LOCK_ID])
  t.strictSame(await migrate(meanwhile), ['0001_users'], 'also while the other one migrates')
})

t.test('a table users of another application is refused, and nothing changes; the advised schema works', async (t) => {
  const url = await createDatabase('foreign_users')
  const relations = () => queryOnce(url, `SELECT oid, relname FROM pg_class ORDER BY oid`)
  await queryOnce(url, 'CREATE TABLE users (email text)')
  const former = await relations()
  const refusal: unknown = await migrate(url).catch((error) => error)
  t.match(refusal, {
    message: /^the schema public has a table users of another application: use another database, or /
  })
  t.strictSame(await relations(), former)
  const [statement = '', options = ''] = `${refusal}`.match(/CREATE SCHEMA \w+|\?options=\S+/g) ?? []

  await t.rejects(migrate(`${url}${options}`), /names no schema that exists/)
  t.strictSame(await relations(), former)

  await queryOnce(url, statement)
  const inParallel = await Promise.all(Array.from({ length: 4 }, () => migrate(`${url}${options}`)))
  t.strictSame(inParallel.flat(), ['0001_users'], 'instances that start together apply it once')
  const app = await build(t, { DATABASE_URL: `${url}${options}` })
  const body = await signUpBody()
  const reply = await client(app).signUp(body)
  t.equal(reply.statusCode, 201)
  t.equal((await client(app).whoAmI(cookieOf(reply))).statusCode, 200)
  t.equal((await client(app).logIn(body)).statusCode, 201)
  t.strictSame(await queryOnce(url, 'SELECT mobile FROM mobile_signup.users'), [{ mobile: body.mobile }])
  t.strictSame(await queryOnce(url, 'SELECT * FROM public.users'), [])
  await t.rejects(migrate(url), /another application/, 'the other schema is still refused')
})

t.test('a table users is refused although the table of the migrations exists, if that is empty', async (t) => {
  // A start that was killed has left it.
  const url = await createDatabase('killed_start')
  await queryOnce(url, 'CREATE TABLE mobile_signup_migrations (id serial PRIMARY KEY, name text, run_on timestamp)')
  await queryOnce(url, 'CREATE TABLE users (email text)')
  await t.rejects(migrate(url), /another application/)
  await queryOnce(url, 'DROP TABLE users')
  t.strictSame(await migrate(url), ['0001_users'])
})

t.test('a migration fails with the reason of Postgres', async (t) => {
  await t.rejects(migrate(stores.databaseUrl.replace(/:[0-9a-f]+@/, ':wrong@')), /password authentication failed/)
})

t.test('the migrate command applies pending migrations and prints their names', async (t) => {
  const url = await createDatabase('by_command')
  const command = fileURLToPath(new URL('../dist/migrate.js', import.meta.url))
  const run = (env: Record<string, string>) => promisify(execFile)(process.execPath, [command], { env })

  t.equal((await run({ DATABASE_URL: url })).stdout, 'applied: 0001_users\n')
  t.equal((await run({ DATABASE_URL: url })).stdout, 'applied: nothing was pending\n')
  await t.rejects(run({}), {
    code: 1,
    stderr: /^migrate: invalid environment:\n {2}DATABASE_URL: is unset; expected a URL/
  })
})
