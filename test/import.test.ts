import { execFile } from 'node:child_process'
import { writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import t from 'tap'
import { client } from '../testkit/client.js'
import { numberFrom } from '../testkit/environment.js'
import { formerHashes, formerUsers } from '../testkit/former-users.js'
import { listen } from '../testkit/listen.js'
import { type ExitResult, runNode } from '../testkit/run-node.js'
import { temporaryFolderFor } from '../testkit/temporary-folder.js'
import { startTestbed } from '../testkit/testbed.js'
import { until } from '../testkit/until.js'

/** `mobile-signup import FILE`: the users of another system. With IMPORT_USERS=100000 it imports so many. */

const { build, newMobile, openProxy, postgres, signUpBody, stores, userRows } = await startTestbed(t)
const directory = temporaryFolderFor(t)
const command = fileURLToPath(new URL('../dist/cli.js', import.meta.url))
const env = { PATH: process.env.PATH, DATABASE_URL: stores.databaseUrl }

/** Imports a file of these lines. */
async function runImport(name: string, lines: string[], options: string[] = [], variables = env): Promise<ExitResult> {
  const file = join(directory, name)
  await writeFile(file, lines.join('\r\n'))
  return runNode([command, 'import', file, ...options], variables)
}

/** Returns a line of JSON for a new, locked user. */
const userLine = (changes: object = {}) => JSON.stringify({ mobile: newMobile(), password_hash: '!', ...changes })

const hashes = formerHashes['correct horse'] ?? []
const [werkzeug = ''] = hashes
const argon2 = `${hashes.at(-1)}`

t.test(
  'good lines of a CSV are imported, bad ones named without what they hold, and it can be run again',
  async (t) => {
    const [ann, locked, taken] = [newMobile(), newMobile(), await signUpBody()]
    const api = client(await build(t))
    t.equal((await api.signUp(taken)).statusCode, 201)
    const csv = [
      '\ufeffname,created_at,mobile,password_hash,other',
      `"Ann ""A"", Ltd",2020-01-02T03:04:05+08:00,${ann},"${argon2}",x`,
      `,,${locked},!4tBqLhmO1rT0nCIvCo8Jx2RzKcyPSrFaYuA3uZd5,x`,
      `,,${taken.mobile},${werkzeug},x`,
      `,,${ann},${werkzeug},x`,
      '',
      `,,1380000000,!,x`,
      `,,${newMobile()},,x`,
      `,,${newMobile()},5f4dcc3b5aa765d61d8327deb882cf99,x`,
      `,,${newMobile()},pbkdf2:sha256:2000001$salt$${'5f'.repeat(32)},x`,
      `,yesterday,${newMobile()},!,x`,
      `,,${newMobile()},!`
    ]
    const badLines = [
      'line 7: the mobile is bad',
      'line 8: the hash is empty',
      'line 9: the hash is of an unknown format, or costs too much',
      'line 10: the hash is of an unknown format, or costs too much',
      'line 11: created_at is no time',
      'line 12: it cannot be parsed'
    ]
    for (const [options, result] of [
      [['--dry-run'], '2 to import, 2 skipped'],
      [[], '2 imported, 2 skipped'],
      [[], '0 imported, 4 skipped']
    ] as const) {
      const { code, stdout, stderr } = await runImport('users.csv', csv, [...options])
      t.equal(code, 1)
      t.equal(stdout, `10 lines: ${result} (the mobile has a user), 6 bad\n`)
      t.strictSame(stderr.trim().split('\n'), badLines)
      t.equal((await userRows(ann)).length, options.length > 0 ? 0 : 1)
    }
    t.match(await userRows(ann), [
      { name: 'Ann "A", Ltd', created_at: new Date('2020-01-01T19:04:05Z'), password_hash: argon2 }
    ])
    t.match(await userRows(locked), [{ name: locked, password_hash: /^!$/ }])
    t.equal((await api.logIn({ mobile: ann, password: 'correct horse' })).statusCode, 201)
    t.equal((await api.logIn({ mobile: locked, password: '!' })).statusCode, 401)
    t.equal(
      (await api.resetPassword(await signUpBody({ mobile: locked }))).statusCode,
      200,
      'a locked user can reset it'
    )
    t.equal((await api.logIn(taken)).statusCode, 400)
    const { mobile, password } = taken
    t.equal((await api.logIn({ mobile, password })).statusCode, 201, 'a user who exists keeps the password')
    t.equal((await postgres.query('SELECT FROM user_events')).rowCount, 0)
  }
)

t.test('users with every kind of hash are imported, log in, and then have an argon2id hash', async (t) => {
  const users = formerUsers(numberFrom('IMPORT_USERS', 2_000))
  const lines = users.map(({ mobile, password_hash }) => `${mobile},"${password_hash}"`)
  const file = join(directory, 'former.csv')
  await writeFile(file, ['mobile,password_hash', 'x,!', ...lines].join('\n'))
  // script(1) gives its command a terminal.
  const args = ['-qec', `${process.execPath} ${command} import ${file}`, '/dev/null']
  const { stdout } = await promisify(execFile)('script', args, { env }).catch((error) => error)
  t.match(stdout, 'line 2: the mobile is bad')
  t.match(stdout, `[${'#'.repeat(30)}] 100 %, ${users.length + 1} lines`, 'on a terminal the progress is a bar')
  t.match(stdout, `${users.length + 1} lines: ${users.length} imported, 0 skipped (the mobile has a user), 1 bad`)

  const app = await build(t)
  const api = client(await listen(t, app.server))
  const tenOfEachKind = 10 * hashes.length
  for (const { mobile, password_hash } of users.slice(0, tenOfEachKind)) {
    t.equal((await api.logIn({ mobile, password: 'correct horse' })).statusCode, 201, password_hash)
  }
  await app.mobileSignup.inFlight.drain()
  const { rows } = await postgres.query(
    "SELECT mobile, password_hash FROM users WHERE mobile LIKE '137%' ORDER BY mobile"
  )
  t.strictSame(rows.slice(tenOfEachKind), users.slice(tenOfEachKind))
  for (const { password_hash } of rows.slice(0, tenOfEachKind))
    t.match(password_hash, /^\$argon2id\$v=19\$m=64,t=1,p=1\$/)
})

t.test('two imports at once do not end in a deadlock, whatever the order of their lines', async (t) => {
  const mobiles = Array.from({ length: 3 }, newMobile).sort()
  const connection = await postgres.connect()
  t.teardown(() => connection.release())
  await connection.query('BEGIN')
  await connection.query("INSERT INTO users (name, mobile, password_hash) VALUES ('', $1, '!')", [mobiles[1]])
  const lines = mobiles.map((mobile) => userLine({ mobile }))
  const outcomes = [runImport('up.jsonl', lines), runImport('down.jsonl', lines.toReversed())]
  await until('both imports wait', async () => {
    const { rows } = await postgres.query('SELECT count(*)::int FROM pg_locks WHERE NOT granted')
    return rows[0].count === 2
  })
  await connection.query('ROLLBACK')
  for (const { code, stderr } of await Promise.all(outcomes)) t.strictSame([code, stderr], [0, ''])
})

t.test('JSON lines are imported, and every line that Postgres refuses is named', async (t) => {
  const mobile = newMobile()
  await postgres.query("ALTER TABLE users ADD CONSTRAINT no_eve CHECK (name <> 'Eve')")
  t.teardown(() => postgres.query('ALTER TABLE users DROP CONSTRAINT no_eve'))
  const names = ['', 'Eve', 'Bob', 'Eve', '\0', '\ud800', '\ufffd', 'x'.repeat(501)]
  const times = ['0000-00-00 00:00:00', '-006000-01-01T00:00:00Z', '+275760-01-01T00:00:00Z', '1', 1_500_000_000]
  const { code, stdout, stderr } = await runImport('users.jsonl', [
    `\ufeff${JSON.stringify({ mobile, password_hash: werkzeug, name: 'Ann\u2028' })}`,
    '',
    ...['{', '[]', 'null', '{"mobile":1}'],
    ...names.map((name) => userLine({ name })),
    userLine({ password_hash: werkzeug.replace('ZtR', 'Z\0R') }),
    ...times.map((created_at) => userLine({ created_at })),
    userLine({ created_at: '2020-01-02 03:04:05.123456+08' })
  ])
  t.strictSame([code, stdout], [1, '20 lines: 4 imported, 0 skipped (the mobile has a user), 16 bad\n'])
  t.strictSame(
    stderr.trim().split('\n').sort(),
    [
      ...[3, 5].map((number) => `line ${number}: it cannot be parsed`),
      ...[4, 6].map((number) => `line ${number}: the mobile is bad`),
      ...[8, 10].map((number) => `line ${number}: Postgres refuses it (23514)`),
      ...[11, 12, 13, 14].map((number) => `line ${number}: the name is bad`),
      'line 15: the hash is of an unknown format, or costs too much',
      ...[16, 17, 18, 19, 20].map((number) => `line ${number}: created_at is no time`)
    ].sort()
  )
  t.match(await userRows(mobile), [{ name: 'Ann\u2028', password_hash: werkzeug }])
})

t.test('what is imported when Postgres goes away stays', async (t) => {
  const proxy = await openProxy(t, 'DATABASE_URL')
  const struck = proxy.strike('INSERT INTO users', { kind: 'reset' }, 1)
  const lines = Array.from({ length: 2_500 }, (_, i) => userLine({ mobile: `${13_800_000_000 + i}` }))
  const outcome = await runImport('outage.jsonl', lines, [], { ...env, DATABASE_URL: proxy.url })
  await struck
  t.match(outcome, { code: 1, stdout: /^1000 lines: 1000 imported, 0 skipped/, stderr: /^import: .*\n$/ })
  t.match(await runImport('outage.jsonl', lines), { code: 0, stdout: /^2500 lines: 1500 imported, 1000 skipped/ })
})

t.test('a command or a file that is wrong is told, with exit code 1', async (t) => {
  const header = 'mobile,password_hash'
  const long = 'x'.repeat(2 ** 20 + 2)
  for (const [name, lines, options, message] of [
    ['header.csv', ['phone,password_hash', '1,2'], [], 'import: the header has no mobile\n'],
    ['any.csv', [], ['--unknown'], "import: Unknown option '--unknown'"],
    ['any.csv', [], ['other.csv'], 'import: expects one FILE\n'],
    ['open.csv', [header, '"1"2,!', '13,!'], [], 'the record since line 3 cannot be parsed\n'],
    ['long.csv', [header, '1,"', long], [], 'import: line 2: its record is over 1 MiB, or a quote is not closed\n'],
    ['array.json', [`[${long}]`], [], 'import: line 1: its record is over 1 MiB']
  ] as const) {
    const { code, stderr } = await runImport(name, [...lines], [...options])
    t.equal(code, 1)
    t.match(stderr, message)
  }
})
