import { readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { PG_MIGRATE_LOCK_ID, runner } from 'node-pg-migrate'
import pg from 'pg'
import t from 'tap'
import { migrate } from '#src/stores/migrations.js'
import { client } from '../testkit/client.js'
import { queryOnce } from '../testkit/postgres-admin.js'
import { runNode } from '../testkit/run-node.js'
import { temporaryFolderFor } from '../testkit/temporary-folder.js'
import { startTestbed } from '../testkit/testbed.js'

const { build, cookieOf, newMobile, postgres, signUpBody, stores } = await startTestbed(t)

t.test('G2: an id has the time, so it is new although the counter goes back, as after a failover', async (t) => {
  const insert = `INSERT INTO users (name, mobile, password_hash) VALUES ('n', $1, 'h') RETURNING id`
  const idOf = async () => BigInt((await postgres.query(insert, [newMobile()])).rows[0].id)
  const { rows } = await postgres.query('SELECT last_value AS last FROM user_id_counter')
  t.ok(Number(rows[0].last) > 1, 'an id does not tell how many users there are')
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

t.test('G2: on Citus an id has the node, too, and a node that does not fit is an error', async (t) => {
  const citusSql = await readFile(new URL('../deploy/citus.sql', import.meta.url), 'utf8')
  const [createFunction = ''] = /^CREATE FUNCTION[\s\S]*?^\$\$;$/m.exec(citusSql) ?? []
  await postgres.query(createFunction)
  const idOf = async (counter: bigint) =>
    BigInt((await postgres.query('SELECT make_user_id($1) AS id', [`${counter}`])).rows[0].id)
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

t.test('another application that uses node-pg-migrate works in the same database, before and after', async (t) => {
  const dir = temporaryFolderFor(t)
  await writeFile(join(dir, '0001_orders.sql'), 'CREATE TABLE orders (id integer);')
  /** With the defaults of its command. */
  const migrateOther = async (databaseUrl: string) => {
    const applied = await runner({ databaseUrl, dir, direction: 'up', migrationsTable: 'pgmigrations', log: () => {} })
    return applied.map(({ name }) => name)
  }

  const before = await stores.createDatabase('other_before')
  t.strictSame(await migrateOther(before), ['0001_orders'])
  const other = new pg.Client(before)
  await other.connect()
  await other.query('SELECT pg_advisory_lock($1)', [PG_MIGRATE_LOCK_ID])
  t.strictSame(await migrate(before), ['0001_users'], 'also while the other one migrates')
  await other.end()

  const after = await stores.createDatabase('other_after')
  t.strictSame(await migrate(after), ['0001_users'])
  t.strictSame(await migrateOther(after), ['0001_orders'])
  for (const url of [before, after]) {
    t.strictSame([await migrate(url), await migrateOther(url)], [[], []], 'nothing is pending')
  }
})

t.test('a table users of another application is refused, and nothing changes; the advised schema works', async (t) => {
  const url = await stores.createDatabase('foreign_users')
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
  t.equal((await client(app).logIn({ mobile: body.mobile, password: body.password })).statusCode, 201)
  t.strictSame(await queryOnce(url, 'SELECT mobile FROM mobile_signup.users'), [{ mobile: body.mobile }])
  t.strictSame(await queryOnce(url, 'SELECT * FROM public.users'), [])

  // A start that was killed has left its table of migrations empty.
  await queryOnce(url, 'CREATE TABLE mobile_signup_migrations (id serial PRIMARY KEY, name text, run_on timestamp)')
  await t.rejects(migrate(url), /another application/, 'the other schema is still refused')
  await queryOnce(url, 'DROP TABLE users')
  t.strictSame(await migrate(url), ['0001_users'])
})

t.test('the migrate command applies pending migrations and prints their names', async (t) => {
  const DATABASE_URL = await stores.createDatabase('by_command')
  for (const stdout of ['applied: 0001_users\n', 'applied: nothing was pending\n'])
    t.strictSame(await runNode(['dist/migrate.js'], { DATABASE_URL }), { code: 0, stdout, stderr: '' })
})
