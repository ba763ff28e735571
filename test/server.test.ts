import { execFile } from 'node:child_process'
import { once } from 'node:events'
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { connect, createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import t, { type Test } from 'tap'
import { holdInserts, signUpBody, until, userRow } from './helper.js'
import { named, said, start } from './service.js'

async function emptyFolder(t: Test): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), 'mobile-signup-test-'))
  t.teardown(() => rm(folder, { recursive: true }))
  return folder
}

/** The ports of the private stores of a folder. */
async function portsIn(folder: string): Promise<number[]> {
  const pid = await readFile(join(folder, '.data/postgres/postmaster.pid'), 'utf8')
  const redisConf = await readFile(join(folder, '.data/redis.conf'), 'utf8')
  return [Number(pid.split('\n')[3]), Number(/^port (\d+)/m.exec(redisConf)?.[1])]
}

async function refusesConnections(port: number): Promise<boolean> {
  const socket = connect(port, '127.0.0.1')
  const connected = await once(socket, 'connect').then(
    () => true,
    () => false
  )
  socket.destroy()
  return !connected
}

/** Runs the curl line of the banner as printed. */
async function runBanner(run: ReturnType<typeof start>) {
  const [command] = await said(run, /curl .*/)
  const { stdout } = await promisify(execFile)('sh', ['-c', command])
  return stdout
}

t.test('the embedded default: the banner’s curl line signs up, data outlives the run and even a kill', async (t) => {
  const folder = await emptyFolder(t)

  const first = start(t, {}, folder)
  t.match(await runBanner(first), /^HTTP\/1.1 201 [\s\S]*"user_id":"1"/)
  const ports = await portsIn(folder)
  first.child.kill('SIGTERM')
  t.strictSame(await first.exit, [0, null], 'SIGTERM ends it with 0')
  for (const port of ports) t.ok(await refusesConnections(port), 'and its stores with it')

  const second = start(t, {}, folder)
  t.match(await runBanner(second), /^HTTP\/1.1 201 [\s\S]*"user_id":"2"/, 'the first user is still there')
  const portsOfSecond = await portsIn(folder)
  second.child.kill('SIGKILL')
  await second.exit
  for (const port of portsOfSecond) await until(() => refusesConnections(port))

  const third = start(t, {}, folder)
  t.match(await runBanner(third), /^HTTP\/1.1 201 /, 'a killed run is survived')

  const rival = start(t, {}, folder)
  t.strictSame(await rival.exit, [1, null], 'a second service in the same folder is refused')
  t.match(rival.output.stderr, /^mobile-signup: the private Postgres did not start: .*postmaster\.pid.*\n$/)
  t.match(await runBanner(third), /idempotent-replayed: true/, 'and the first one is not disturbed')

  third.child.kill('SIGINT')
  t.strictSame(await third.exit, [0, null], 'SIGINT ends it with 0')
})

t.test('named stores: an empty database is migrated at start, and JSON lines are logged', async (t) => {
  const run = start(t, named)
  const [, url] = await said(run, /Server listening at (http:[^"]+)/)
  const body = await signUpBody()
  const reply = await fetch(`${url}/api/v1.0/users`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify(body)
  })
  t.equal(reply.status, 201)
  t.equal((await userRow(body.mobile)).length, 1)
  run.child.kill('SIGTERM')
  t.strictSame(await run.exit, [0, null])
  for (const line of run.output.stdout.trim().split('\n')) t.doesNotThrow(() => JSON.parse(line))
})

t.test('a bad environment stops the start, with one message and exit code 1', async (t) => {
  const run = start(t, { ...named, PORT: 'http', LEGACY_STATUS: '1' })
  t.strictSame(await run.exit, [1, null])
  t.equal(
    run.output.stderr,
    `mobile-signup: the environment is not usable:
  PORT: "http" is not an integer; expected an integer from 0 to 65535
  LEGACY_STATUS: "1" is neither; expected true or false
`
  )
})

t.test('a port that is taken stops the start, with one line and exit code 1', async (t) => {
  const taken = createServer().listen(0, '127.0.0.1')
  t.teardown(() => taken.close())
  await once(taken, 'listening')
  const address = taken.address()
  const run = start(t, { ...named, PORT: typeof address === 'object' ? `${address?.port}` : '' })
  t.strictSame(await run.exit, [1, null])
  t.match(run.output.stderr, /^mobile-signup: listen EADDRINUSE: [^\n]*\n$/)
})

t.test('a store that is down stops the start after ten seconds, with one line and exit code 1', async (t) => {
  const runs = [
    start(t, { ...named, DATABASE_URL: 'postgresql://postgres@127.0.0.1:1/postgres' }),
    start(t, { ...named, REDIS_URL: 'redis://127.0.0.1:1' })
  ]
  for (const [n, name] of ['Postgres', 'Redis'].entries()) {
    const run = runs[n]
    t.strictSame(await run?.exit, [1, null])
    t.match(run?.output.stderr, new RegExp(`^mobile-signup: ${name} does not answer: .*ECONNREFUSED[^\\n]*\\n$`))
  }
})

t.test(
  'SIGTERM: ready fails at once, requests are served for SHUTDOWN_DELAY_MS, and then it exits with 0',
  async (t) => {
    const run = start(t, { ...named, SHUTDOWN_DELAY_MS: '1500' })
    const [, url] = await said(run, /Server listening at (http:[^"]+)/)
    t.equal((await fetch(`${url}/health/ready`)).status, 200)
    run.child.kill('SIGTERM')
    await until(async () => (await fetch(`${url}/health/ready`)).status === 503)
    t.equal((await fetch(`${url}/api/v1.0/session`)).status, 401)
    t.equal((await fetch(`${url}/health/live`)).status, 200)
    t.strictSame(await run.exit, [0, null])
  }
)

t.test('a second signal ends it at once, and so does SHUTDOWN_TIMEOUT_MS', async (t) => {
  const twice = start(t, { ...named, SHUTDOWN_DELAY_MS: '60000' })
  const [, url] = await said(twice, /Server listening at (http:[^"]+)/)
  twice.child.kill('SIGTERM')
  await until(async () => (await fetch(`${url}/health/ready`)).status === 503)
  twice.child.kill('SIGTERM')
  t.strictSame(await twice.exit, [1, null])

  // A sign-up that takes longer: its row is behind a lock.
  const slow = start(t, { ...named, STORE_TIMEOUT_MS: '30000', SHUTDOWN_TIMEOUT_MS: '500' })
  const [, slowUrl] = await said(slow, /Server listening at (http:[^"]+)/)
  const inserts = await holdInserts()
  fetch(`${slowUrl}/api/v1.0/users`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify(await signUpBody())
  }).catch(() => undefined)
  await inserts.arrived(1)
  slow.child.kill('SIGTERM')
  t.strictSame(await slow.exit, [1, null])
  await inserts.release()
})
