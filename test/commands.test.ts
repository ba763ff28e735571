import { execFile } from 'node:child_process'
import { once } from 'node:events'
import { existsSync } from 'node:fs'
import { readFile, writeFile } from 'node:fs/promises'
import { connect } from 'node:net'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import t, { type Test } from 'tap'
import type { Environment } from '#src/config/config.js'
import { client } from '../testkit/client.js'
import { postmasterPid } from '../testkit/postgres-admin.js'
import { initializedFolder } from '../testkit/private-stores.js'
import { runNode } from '../testkit/run-node.js'
import { ServerProcess } from '../testkit/server-process.js'
import { startWebhook } from '../testkit/sms-webhook.js'
import { temporaryFolderFor } from '../testkit/temporary-folder.js'
import { patient } from '../testkit/testbed.js'
import { isFulfilled, until } from '../testkit/until.js'

/*
 * npm start (dev/start.ts), in folders of its own, and the command of the package, mobile-signup.
 */

const npmStart = [
  `--import=${import.meta.resolve('tsx/esm')}`,
  fileURLToPath(new URL('../dev/start.ts', import.meta.url))
]

// Each start takes seconds of CPU time.
t.jobs = 2

/** Creates a folder with initialized stores, so that a start in it is not the first. */
async function createInitializedFolder(t: Test): Promise<string> {
  const folder = temporaryFolderFor(t)
  await promisify(execFile)('cp', ['-a', await initializedFolder(), join(folder, '.data')])
  return folder
}

/** Runs `npm start` as in this folder, where private stores keep their data. */
function start(t: Test, folder: string, env: Environment = {}): ServerProcess {
  const service = ServerProcess.start(npmStart, {
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
  const isConnected = await isFulfilled(once(socket, 'connect'))
  socket.destroy()
  return !isConnected
}

/** Returns the counter in the id of a printed reply. */
const counterOf = (reply: string) => BigInt(/"user_id":"(\d+)"/.exec(reply)?.[1] ?? -1) & 4_194_303n

const signedUp = /^HTTP\/1.1 201 /

/** Fails if a store of the folder runs. */
async function assertNoStore(t: Test, folder: string): Promise<void> {
  const { stdout } = await promisify(execFile)('ps', ['-eo', 'args'])
  t.notMatch(stdout, folder, 'no store is left')
}

t.test('npm start runs the service on private stores, whose data survives restarts and kills', async (t) => {
  const folder = temporaryFolderFor(t)
  const mobile = '13812345678'

  const interrupted = start(t, folder)
  await until('Postgres is being initialized', () => existsSync(join(folder, '.data/postgres.unfinished')))
  // Under npm a Ctrl-C arrives twice. Two of the same signal could arrive as one.
  interrupted.kill('SIGINT')
  interrupted.kill('SIGTERM')
  t.strictSame(await interrupted.exit, [0, null], 'a Ctrl-C ends a first start')
  t.equal(interrupted.stderr, '')
  await assertNoStore(t, folder)

  const first = start(t, folder)
  const url = await first.url()
  const firstReply = await runPrintedCommand(first)
  t.match(firstReply, signedUp, 'the printed command signs up')
  t.match(await (await fetch(url)).text(), '<title>', 'the sign-up page is at /')
  t.equal((await client(url).sendCode(mobile)).statusCode, 202)
  const [, code = ''] = await first.waitFor(/SMS code.*"138\*{4}5678".*"(\d{6})"/)
  const body = { mobile, sms_code: code, password: 'correct horse', password2: 'correct horse' }
  t.equal((await client(url).signUp(body)).statusCode, 201, 'the code is in the log')

  const rival = start(t, folder)
  t.strictSame(await rival.exit, [1, null], 'a second service in the same folder does not start')
  t.match(rival.stderr, /^mobile-signup: the private Postgres did not start: .*postmaster\.pid.*\n$/)
  t.equal((await client(url).logIn({ mobile, password: body.password })).statusCode, 201, 'it disturbs nobody')

  const ports = await storePorts(folder)
  first.kill('SIGKILL')
  await first.exit
  for (const port of ports) await until(`port ${port} is closed`, () => refusesConnections(port))

  const webhook = await startWebhook(t)
  const second = start(t, folder, { SMS_WEBHOOK_URL: webhook.url, SMS_RESEND_S: '0' })
  // The printed command has used one id, and the person above another.
  t.equal(counterOf(await runPrintedCommand(second)), (counterOf(firstReply) + 2n) & 4_194_303n, 'both users exist')
  t.equal((await client(await second.url()).sendCode('13912345678')).statusCode, 202)
  t.equal(webhook.received.length, 1, 'codes go to the webhook')
  t.notMatch(second.stdout, 'SMS code {')

  const postgres = postmasterPid(postgresData(folder))
  process.kill(postgres, 'SIGSTOP')
  second.kill('SIGTERM')
  const { port } = new URL(await second.url())
  await until('the service is closed', () => refusesConnections(Number(port)))
  t.notOk(second.hasExited, 'it waits for its stores')
  await until('a later signal ends it', () => {
    second.kill('SIGTERM')
    return second.hasExited
  })
  t.strictSame(await second.exit, [1, null])
  process.kill(postgres, 'SIGCONT')
  await until('Postgres has ended', () => !existsSync(join(postgresData(folder), 'postmaster.pid')))
})

t.test('with a store URL, or in production, npm start is the service alone', async (t) => {
  const folder = temporaryFolderFor(t)
  for (const env of [{ DATABASE_URL: 'postgresql://127.0.0.1:1/postgres' }, { NODE_ENV: 'production' }]) {
    const service = start(t, folder, env)
    t.strictSame(await service.exit, [1, null])
    t.match(service.stderr, /^mobile-signup: invalid environment:\n {2}(DATABASE_URL|REDIS_URL).*: unset/)
  }
  t.notOk(existsSync(join(folder, '.data')))
})

t.test('an npm start that fails prints one line that says what to do, and leaves no store behind', async (t) => {
  const file = temporaryFolderFor(t)
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

t.test('mobile-signup starts the service, migrates, and says what each command needs', async (t) => {
  const file = fileURLToPath(new URL('../dist/cli.js', import.meta.url))
  const run = (...args: string[]) => runNode([file, ...args], {})
  const { code, stdout } = await run('migrate', '--help')
  t.equal(code, 0)
  for (const text of ['mobile-signup migrate', 'DATABASE_URL', 'TRUST_PROXY']) t.match(stdout, text)
  for (const args of [['unknown'], ['migrate', 'unknown']]) {
    t.match(await run(...args), { code: 1, stdout: /^$/, stderr: /^usage:/ })
  }
  t.match(await run('migrate'), { code: 1, stderr: /^migrate: invalid environment:/ })
  const faults = ['PORT: is "http"; .*', 'LEGACY_STATUS: is "1"; .*', 'DATABASE_URL, REDIS_URL: unset; .*']
  const stderr = new RegExp(`^mobile-signup: invalid environment:\n  ${faults.join('\n  ')}\n$`)
  t.match(await runNode([file], { PORT: 'http', LEGACY_STATUS: '1' }), { code: 1, stderr })
})
