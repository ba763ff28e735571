import { execFile } from 'node:child_process'
import { readFile } from 'node:fs/promises'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import pg from 'pg'
import t from 'tap'
import { migrate } from '../dist/stores/migrations.js'
import { startTestbed } from '../testkit/testbed.js'

const { stores, postgres, newMobile } = await startTestbed(t)

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
  t.strictSame(applied.flat(), ['0001_users', '0002_session_epoch', '0003_user_ids'], 'each migration is applied once')

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

t.test(
  'users of a former version keep their ids, and a role that may only use the table can insert users',
  async (t) => {
    const url = await createDatabase('former')
    const client = new pg.Client(url)
    await client.connect()
    const sql = (name: string) => readFile(new URL(`../sql/${name}.sql`, import.meta.url), 'utf8')
    const insert = (mobile: string) =>
      client.query(`INSERT INTO users (name, mobile, password_hash) VALUES ('n', $1, 'h') RETURNING id`, [mobile])
    const inTransaction = (text: string) => client.query(`BEGIN; ${text} COMMIT`)
    await inTransaction(await sql('0001_users'))
    await inTransaction(await sql('0002_session_epoch'))
    await insert('1')
    await insert('2')
    await client.query('CREATE ROLE restricted; GRANT SELECT, INSERT ON users TO restricted')
    await inTransaction(await sql('0003_user_ids'))
    await client.query('SET ROLE restricted')
    await insert('3')
    const { rows } = await client.query('SELECT mobile, id FROM users ORDER BY id')
    await client.end()
    t.match(rows, [
      { mobile: '1', id: '1' },
      { mobile: '2', id: '2' },
      { mobile: '3', id: /^\d{15,19}$/ }
    ])
  }
)

t.test('a migration fails with the reason of Postgres', async (t) => {
  await t.rejects(migrate(stores.databaseUrl.replace(/:[0-9a-f]+@/, ':wrong@')), /password authentication failed/)
})

t.test('the migrate command applies pending migrations and prints their names', async (t) => {
  const url = await createDatabase('by_command')
  const command = fileURLToPath(new URL('../dist/migrate.js', import.meta.url))
  const run = (env: Record<string, string>) => promisify(execFile)(process.execPath, [command], { env })

  t.equal((await run({ DATABASE_URL: url })).stdout, 'applied: 0001_users, 0002_session_epoch, 0003_user_ids\n')
  t.equal((await run({ DATABASE_URL: url })).stdout, 'applied: nothing was pending\n')
  await t.rejects(run({}), {
    code: 1,
    stderr: /^migrate: invalid environment:\n {2}DATABASE_URL: is unset; expected a URL/
  })
})
