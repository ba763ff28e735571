import { execFile } from 'node:child_process'
import { rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import t from 'tap'
import { client } from '../testkit/client.js'
import { numberFrom } from '../testkit/environment.js'
import { formerUsers } from '../testkit/former-users.js'
import { listen } from '../testkit/listen.js'
import { createTemporaryFolder } from '../testkit/temporary-folder.js'
import { startTestbed } from '../testkit/testbed.js'

/** `mobile-signup import FILE`: the users of another system. With IMPORT_USERS=100000 it imports so many. */

const { build, newMobile, postgres, signUpBody, stores, userRows } = await startTestbed(t)
const directory = createTemporaryFolder()
t.teardown(() => rm(directory, { recursive: true }))
const command = fileURLToPath(new URL('../dist/cli.js', import.meta.url))
const env = { PATH: process.env.PATH, DATABASE_URL: stores.databaseUrl }

interface Outcome {
  code: number
  stdout: string
  stderr: string
}

async function runImport(name: string, content: string, ...options: string[]): Promise<Outcome> {
  const file = join(directory, name)
  await writeFile(file, content)
  return new Promise((resolve) => {
    const child = execFile(process.execPath, [command, 'import', file, ...options], { env }, (_error, stdout, stderr) =>
      resolve({ code: child.exitCode ?? -1, stdout, stderr })
    )
  })
}

const werkzeug = 'pbkdf2:sha256:1000$ZtRZf4wZbpMUUGfk$6c0499432bb2ea2375bbcfefa555b0a2a3a0419ca6280fff82e1a662a9ea76c4'
const argon2 = '$argon2id$v=19$m=64,t=1,p=1$rwmxjxEVCuOQBHAveedAHQ$WFQURCKyxQxxc7Z9BTJpN3UQ2aaylzwfVn5D9muK7uM'

t.test(
  'good lines of a CSV are imported, bad ones named without what they hold, and it can be run again',
  async (t) => {
    const [ann, locked, taken] = [newMobile(), newMobile(), await signUpBody()]
    const api = client(await build(t))
    t.equal((await api.signUp(taken)).statusCode, 201)
    const csv = [
      '\ufeffname,created_at,mobile,password_hash,other',
      `"Ann ""A"", Ltd",2020-01-02T03:04:05+08:00,${ann},"${argon2}",x`,
      `,,${locked},!,x`,
      `,,${taken.mobile},${werkzeug},x`,
      `,,${ann},${werkzeug},x`,
      '',
      `,,1380000000,!,x`,
      `,,${newMobile()},,x`,
      `,,${newMobile()},5f4dcc3b5aa765d61d8327deb882cf99,x`,
      `,,${newMobile()},pbkdf2:sha256:2000001$salt$${'5f'.repeat(32)},x`,
      `,yesterday,${newMobile()},!,x`,
      `,,${newMobile()},!`
    ].join('\r\n')
    const badLines = [
      'line 7: the mobile is bad',
      'line 8: the hash is empty',
      'line 9: the hash is of an unknown format',
      'line 10: the hash is of an unknown format',
      'line 11: created_at is no time',
      'line 12: it cannot be parsed'
    ]
    for (const [options, result] of [
      [['--dry-run'], '2 to import, 2 skipped'],
      [[], '2 imported, 2 skipped'],
      [[], '0 imported, 4 skipped']
    ] as const) {
      const { code, stdout, stderr } = await runImport('users.csv', csv, ...options)
      t.equal(code, 1)
      t.equal(stdout, `10 lines: ${result} (the mobile has a user), 6 bad\n`)
      t.strictSame(stderr.trim().split('\n'), badLines)
      t.equal((await userRows(ann)).length, options.length > 0 ? 0 : 1)
    }
    t.match(await userRows(ann), [
      { name: 'Ann "A", Ltd', created_at: new Date('2020-01-01T19:04:05Z'), password_hash: argon2 }
    ])
    t.match(await userRows(locked), [{ name: locked }])
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

t.test('the passwords of five kinds of hashes log in, and become argon2id', async (t) => {
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
  const loggedIn = users.slice(0, 50)
  for (const { mobile, password, password_hash } of loggedIn) {
    t.equal((await api.logIn({ mobile, password })).statusCode, 201, password_hash)
  }
  await app.mobileSignup.inFlight.drain()
  const { rows } = await postgres.query('SELECT * FROM users WHERE mobile = ANY ($1) ORDER BY mobile', [
    users.map(({ mobile }) => mobile)
  ])
  const replaced = rows.filter(({ password_hash }, i) => password_hash !== users[i]?.password_hash)
  t.strictSame([rows.length, replaced], [users.length, rows.slice(0, 50)])
  for (const { password_hash } of replaced) t.match(password_hash, /^\$argon2id\$v=19\$m=64,t=1,p=1\$/)
})

t.test('JSON lines are imported, too', async (t) => {
  const mobile = newMobile()
  const lines = [
    JSON.stringify({ mobile, password_hash: werkzeug, name: 'Ann' }),
    '',
    '{',
    '[]',
    'null',
    '{"mobile":1}'
  ]
  const { code, stdout, stderr } = await runImport('users.jsonl', lines.join('\n'))
  t.strictSame([code, stdout], [1, '5 lines: 1 imported, 0 skipped (the mobile has a user), 4 bad\n'])
  t.strictSame(stderr.match(/^line \d/gm), ['line 3', 'line 4', 'line 5', 'line 6'])
  t.match(await userRows(mobile), [{ name: 'Ann', password_hash: werkzeug }])
})

t.test('a file that is absent, or has no such columns, is one line and exit code 1', async (t) => {
  t.match(await runImport('header.csv', 'phone,password_hash\n1,2\n'), {
    code: 1,
    stdout: '',
    stderr: 'import: the header has no mobile\n'
  })
  const { code, stderr } = await runImport('any.csv', '', '--unknown')
  t.equal(code, 1)
  t.match(stderr, /^import: Unknown option/)
})
