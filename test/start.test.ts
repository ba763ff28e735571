import { execFile } from 'node:child_process'
import { once } from 'node:events'
import { existsSync } from 'node:fs'
import { readFile, rm, writeFile } from 'node:fs/promises'
import { connect } from 'node:net'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import t, { type Test } from 'tap'
import type { Environment } from '#src/config/config.js'
import { client } from '../testkit/client.js'
import { postmasterPid } from '../testkit/postgres-admin.js'
import { initializedFolder } from '../testkit/private-stores.js'
import { ServerProcess } from '../testkit/server-process.js'
import { startWebhook } from '../testkit/sms-webhook.js'
import { createTemporaryFolder } from '../testkit/temporary-folder.js'
import { patient } from '../testkit/testbed.js'
import { until } from '../testkit/until.js'

/*
 * npm start: dev/start.ts, in folders of their own.
 */

const command = [
  `--import=${import.meta.resolve('tsx/esm')}`,
  fileURLToPath(new URL('../dev/start.ts', import.meta.url))
]

// Each start takes seconds of CPU time.
t.jobs = 2

async function createFolder(t: Test): Promise<string> {
  const folder = createTemporaryFolder()
  t.teardown(() => rm(folder, { recursive: true }))
  return folder
}

/** Creates a folder with initialized stores, so that a start in it is not the first. */
async function createInitializedFolder(t: Test): Promise<string> {
  const folder = await createFolder(t)
  await promisify(execFile)('cp', ['-a', await initializedFolder(), join(folder, '.data')])
  return folder
}

/** Runs `npm start` as in this folder, where private stores keep their data. */
function start(t: Test, folder: string, env: Environment = {}): ServerProcess {
  const service = ServerProcess.start(command, {
    env: { ...patient, ...env },
    cwd: folder,
    announcement: /Sign up at (http:\S+)\//
  })
  t.teardown(() => service.dispose())
  return service
}

/** Runs the curl command that a start prints, and returns the reply with its headers. */
async function runPrintedCommand(service: ServerProcess): Promise<string> {
  const [command] = await service.waitFor(/curl .*(?=\n)/)
  const { stdout } = await promisify(execFile)('sh', ['-c', command])
  return stdout
}

const postgresData = (folder: string) => join(folder, '.data/postgres')

/** Returns the ports of the private stores of a folder. */
async function storePorts(folder: string): Promise<number[]> {
  const postmasterPid = await readFile(join(postgresData(folder), 'postmaster.pid'), 'utf8')
  const redisConfig = await readFile(join(folder, '.data/redis.conf'), 'utf8')
  return [Number(postmasterPid.split('\n')[3]), Number(/^port (\d+)/m.exec(redisConfig)?.[1])]
}

async function refusesConnections(port: number): Promise<boolean> {
  const socket = connect(port, '127.0.0.1')
  const isRefused = await once(socket, 'connect').then(
    () => false,
    () => true
  )
  socket.destroy()
  return isRefused
}

/** Returns the counter in the id of a printed reply. */
const counterOf = (reply: string) => BigInt(/"user_id":"(\d+)"/.exec(reply)?.[1] ?? -1) & 4_194_303n

/** Fails if a store of the folder runs. */
async function assertNoStore(t: Test, folder: string): Promise<void> {
  const { stdout } = await promisify(execFile)('ps', ['-eo', 'args'])
  t.notMatch(stdout, folder, 'no store is left')
}

t.test('without store URLs the service runs on private stores, whose data survives restarts and kills', async (t) => {
  const folder = await createFolder(t)

  const first = start(t, folder)
  const firstReply = await runPrintedCommand(first)
  t.match(firstReply, /^HTTP\/1.1 201 /, 'the printed command signs up')
  const firstPorts = await storePorts(folder)
  first.kill('SIGTERM')
  t.strictSame(await first.exit, [0, null], 'SIGTERM ends it with exit code 0')
  for (const port of firstPorts) t.ok(await refusesConnections(port), 'the stores end with the service')

  const second = start(t, folder)
  const nextCounter = (counterOf(firstReply) + 1n) & 4_194_303n
  t.equal(counterOf(await runPrintedCommand(second)), nextCounter, 'the first user still exists')
  const secondPorts = await storePorts(folder)
  second.kill('SIGKILL')
  await second.exit
  for (const port of secondPorts) await until(`port ${port} is closed`, () => refusesConnections(port))

  const third = start(t, folder)
  t.match(await runPrintedCommand(third), /^HTTP\/1.1 201 /, 'a start after a kill works')

  const rival = start(t, folder)
  t.strictSame(await rival.exit, [1, null], 'a second service in the same folder does not start')
  t.match(rival.stderr, /^mobile-signup: the private Postgres did not start: .*postmaster\.pid.*\n$/)
  t.match(await runPrintedCommand(third), /^HTTP\/1.1 201 /, 'the running service is not disturbed')

  // Ctrl-C arrives twice: npm passes it on. Two of the same signal could arrive as one.
  third.kill('SIGINT')
  third.kill('SIGTERM')
  t.strictSame(await third.exit, [0, null], 'one Ctrl-C ends it with exit code 0')
  await assertNoStore(t, folder)
})

t.test('the sign-up page is at /, and the codes are in the log unless there is a webhook', async (t) => {
  const folder = await createInitializedFolder(t)
  const mobile = '13812345678'

  const service = start(t, folder)
  const url = await service.url()
  t.match(await (await fetch(url)).text(), '<title>')
  t.equal((await client(url).sendCode(mobile)).statusCode, 202)
  const [, code = ''] = await service.waitFor(/SMS code.*"138\*{4}5678".*"(\d{6})"/)
  const body = { mobile, sms_code: code, password: 'correct horse', password2: 'correct horse' }
  t.equal((await client(url).signUp(body)).statusCode, 201)
  t.equal(await service.stop(), 0)

  const webhook = await startWebhook(t)
  const withWebhook = start(t, folder, { SMS_WEBHOOK_URL: webhook.url, SMS_RESEND_S: '0' })
  t.equal((await client(await withWebhook.url()).sendCode(mobile)).statusCode, 202)
  t.equal(webhook.received.length, 1)
  t.equal(await withWebhook.stop(), 0)
  t.notMatch(withWebhook.stdout, 'SMS code {')
})

t.test('with a store URL, or in production, it is the service alone', async (t) => {
  const folder = await createFolder(t)
  for (const env of [
    { DATABASE_URL: 'postgresql://127.0.0.1:1/postgres' },
    { REDIS_URL: 'redis://127.0.0.1:1' },
    { NODE_ENV: 'production' }
  ]) {
    const service = start(t, folder, env)
    t.strictSame(await service.exit, [1, null])
    t.match(service.stderr, /^mobile-signup: invalid environment:\n {2}(DATABASE_URL|REDIS_URL).*: unset/)
  }
  t.notOk(existsSync(join(folder, '.data')))
})

t.test('a start that fails prints one line that says what to do, and leaves no store behind', async (t) => {
  const file = await createFolder(t)
  await writeFile(join(file, '.data'), 'a file')
  const withoutFolder = start(t, file)
  t.strictSame(await withoutFolder.exit, [1, null])
  t.match(withoutFolder.stderr, /^mobile-signup: cannot create \/.*\.data .*: set DATABASE_URL and REDIS_URL .*\n$/)

  const folder = await createInitializedFolder(t)
  const webhook = await startWebhook(t)
  const withoutPort = start(t, folder, { PORT: new URL(webhook.url).port })
  t.strictSame(await withoutPort.exit, [1, null])
  t.match(withoutPort.stderr, /^mobile-signup: listen EADDRINUSE: [^\n]*\n$/)
  await assertNoStore(t, folder)
})

t.test('SIGTERM during a first start ends the private stores, too, whatever has been started', async (t) => {
  for (const file of ['secret', 'postgres.unfinished', 'postgres.log', 'redis.log']) {
    const folder = await createFolder(t)
    const service = start(t, folder)
    await until(`${file} exists`, () => existsSync(join(folder, '.data', file)))
    service.kill('SIGTERM')
    t.strictSame(await service.exit, [0, null], file)
    t.equal(service.stderr, '')
    await assertNoStore(t, folder)
    if (file.endsWith('.log')) continue
    const next = start(t, folder)
    t.match(await runPrintedCommand(next), /^HTTP\/1.1 201 /, 'the next start works')
    t.equal(await next.stop(), 0)
  }
})

t.test('a second signal does not wait for the stores', async (t) => {
  const folder = await createInitializedFolder(t)
  const service = start(t, folder)
  const port = new URL(await service.url()).port
  const postgres = postmasterPid(postgresData(folder))
  process.kill(postgres, 'SIGSTOP')
  service.kill('SIGTERM')
  await until('the service is closed', () => refusesConnections(Number(port)))
  t.notOk(service.hasExited)
  await until('a later signal ends it', () => {
    service.kill('SIGTERM')
    return service.hasExited
  })
  t.strictSame(await service.exit, [1, null])
  process.kill(postgres, 'SIGCONT')
  await until('Postgres has ended', () => !existsSync(join(postgresData(folder), 'postmaster.pid')))
})
