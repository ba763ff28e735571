import { execFile } from 'node:child_process'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import t from 'tap'

const command = fileURLToPath(new URL('../dist/cli.js', import.meta.url))

const run = (args: string[], env: Record<string, string> = {}) =>
  promisify(execFile)(process.execPath, [command, ...args], {
    env: { PATH: process.env.PATH, ...env },
    timeout: 120_000
  })

t.test('mobile-signup --help says what each command needs', async (t) => {
  for (const args of [['--help'], ['migrate', '--help']]) {
    const { stdout } = await run(args)
    for (const text of ['mobile-signup migrate', 'DATABASE_URL', 'TRUST_PROXY']) {
      t.match(stdout, text)
    }
  }
})

t.test('an unknown command prints the usage and fails', async (t) => {
  for (const args of [['unknown'], ['migrate', 'unknown']]) {
    await t.rejects(run(args), { code: 1, stdout: '', stderr: /^usage:/ })
  }
})

t.test('mobile-signup starts the service, and mobile-signup migrate the migrations', async (t) => {
  const invalid = /^mobile-signup: invalid environment:\n {2}DATABASE_URL, REDIS_URL: unset/
  await t.rejects(run([]), { code: 1, stderr: invalid })
  await t.rejects(run(['migrate']), { code: 1, stderr: /^migrate: invalid environment:/ })
})

t.test("npm run calibrate measures OWASP's settings, and prints the fastest", async (t) => {
  const args = ['--import', 'tsx/esm', 'bench/calibrate.ts']
  const { stdout } = await promisify(execFile)(process.execPath, args, { timeout: 120_000 })
  for (const [memoryKib, passes] of [
    [47_104, 1],
    [19_456, 2],
    [12_288, 3],
    [9_216, 4],
    [7_168, 5]
  ]) {
    t.match(stdout, new RegExp(`^ *${memoryKib} +${passes} +1 +[\\d.]+ +[\\d.]+ `, 'm'))
  }
  // The settings, the number of threads and the hashes/s of each row.
  const rows = [...stdout.matchAll(/^ *(\d+ +\d) +(\d+) +([\d.]+) /gm)].map(([, setting = '', threads, rate]) => ({
    setting: setting.split(/ +/),
    threads: Number(threads),
    rate: Number(rate)
  }))
  const threadsMax = Math.max(...rows.map(({ threads }) => threads))
  const withAllThreads = rows.filter(({ threads }) => threads === threadsMax)
  const rateMax = Math.max(...withAllThreads.map(({ rate }) => rate))
  const [, ...printed] = /^HASH_MEMORY_KIB=(\d+)\nHASH_PASSES=(\d)$/m.exec(stdout) ?? []
  t.equal(withAllThreads.find(({ setting }) => `${setting}` === `${printed}`)?.rate, rateMax)
  t.match(stdout, /completes about \d+ sign-ups\/s/)
})
