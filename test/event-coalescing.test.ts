import fsPromises from 'node:fs/promises'
import { createServer } from 'node:http'
import { syncBuiltinESMExports } from 'node:module'
import { connect } from 'node:net'
import { setImmediate as endOfPass } from 'node:timers/promises'
import Fastify, { type FastifyInstance } from 'fastify'
import t, { type Test } from 'tap'
import { signUp } from '../dist/app.js'
import { EventCoalescing } from '../dist/passwords/event-coalescing.js'
import { client } from '../testkit/client.js'
import { listen } from '../testkit/listen.js'
import { startTestbed } from '../testkit/testbed.js'
import { until } from '../testkit/until.js'

const { build, config, signUpBody } = await startTestbed(t)

/** Hashes of about 10 ms, in one thread, which may be slow on a busy machine. */
const realHashes = { HASH_MEMORY_KIB: '19456', HASH_PASSES: '2', HASH_THREADS: '1', HASH_MAX_WAIT_MS: '600000' }

/** Collects the sleeps of the event loop during a test, in milliseconds. */
function watchSleeps(t: Test): number[] {
  const sleeps: number[] = []
  const { wait } = Atomics
  const watched = (array: Int32Array, index: number, value: number, ms = Number.POSITIVE_INFINITY) => {
    sleeps.push(ms)
    return wait(array, index, value, ms)
  }
  Object.assign(Atomics, { wait: watched })
  t.teardown(() => Object.assign(Atomics, { wait }))
  return sleeps
}

/** Sends sign-ups one after the other on a number of connections. */
async function signUpOn(app: FastifyInstance, connections: number, count: number): Promise<void> {
  const { signUp } = client(app)
  const bodies = await Promise.all(Array.from({ length: count }, () => signUpBody()))
  await Promise.all(
    Array.from({ length: connections }, async () => {
      for (let body = bodies.pop(); body !== undefined; body = bodies.pop()) {
        t.equal((await signUp(body)).statusCode, 201)
      }
    })
  )
}

/** Starts to coalesce events, and ends it after the test at the latest: else the process never ends. */
function coalesce(t: Test, slackMs: number, timeoutMs = 30_000) {
  const control = { slackMs, questions: 0 }
  t.teardown(() => {
    control.slackMs = 0
  })
  const slackNow = () => {
    control.questions++
    return control.slackMs
  }
  new EventCoalescing(slackNow, timeoutMs).start()
  return control
}

t.test('the event loop sleeps for 0.8 of the slack, at most 10 ms and a twentieth of the timeout', async (t) => {
  for (const [slackMs, timeoutMs, sleepMs] of [
    [8, 1_000, 6.4],
    [1_000, 1_000, 10],
    [1_000, 100, 5]
  ] as const) {
    await t.test(`${slackMs} ms, ${timeoutMs} ms`, async (t) => {
      const sleeps = watchSleeps(t)
      const control = coalesce(t, slackMs, timeoutMs)
      await until('it has slept three times', () => endOfPass(sleeps.length >= 3))
      for (const ms of sleeps) t.equal(ms, sleepMs)

      control.slackMs = 0
      await endOfPass()
      const questionsBefore = control.questions
      await endOfPass()
      t.equal(control.questions, questionsBefore, 'without slack it ends')
    })
  }
})

t.test('the event loop does not sleep while connections wait to be accepted', async (t) => {
  const sleeps = watchSleeps(t)
  /** How often it had slept when each connection was accepted. */
  const sleepsBefore: number[] = []
  const server = createServer().on('connection', () => sleepsBefore.push(sleeps.length))
  const { port } = new URL(await listen(t, server))
  const sockets = Array.from({ length: 20 }, () => connect(Number(port), '127.0.0.1'))
  t.teardown(() => {
    for (const socket of sockets) socket.destroy()
  })
  coalesce(t, 1_000)
  await until('all are accepted', () => endOfPass(sleepsBefore.length === sockets.length))
  t.equal(sleepsBefore.at(-1), sleepsBefore[0], 'no sleep from the first to the last of them')
  await until('then it sleeps', () => endOfPass(sleeps.length > 0))
})

t.test('sleeps of less than a millisecond are left out', async (t) => {
  for (const [slackMs, timeoutMs] of [
    [1, 1_000],
    [1_000, 10]
  ] as const) {
    const sleeps = watchSleeps(t)
    coalesce(t, slackMs, timeoutMs)
    for (let pass = 0; pass < 3; pass++) await endOfPass()
    t.strictSame(sleeps, [])
  }
})

t.test('the event loop sleeps only while more hashes wait than the threads have in hand', async (t) => {
  const app = await build(t, realHashes)
  const sleeps = watchSleeps(t)
  await signUpOn(app, 2, 6)
  t.strictSame(sleeps, [], 'one thread has two hashes in hand')
  await signUpOn(app, 12, 48)
  t.ok(sleeps.length > 0)
})

t.test('in a host application the event loop sleeps only if the host asks for it', async (t) => {
  const sleeps = watchSleeps(t)
  for (const options of [{}, { coalesceEvents: true }]) {
    const host = Fastify()
    t.after(() => host.close())
    await host.register(signUp, { prefix: '/api/v1.0', config: config(realHashes), ...options })
    await signUpOn(host, 12, 48)
    t.equal(sleeps.length > 0, 'coalesceEvents' in options)
  }
})

t.test('a start warns where transparent huge pages are off', async (t) => {
  const { readFile } = fsPromises
  const replaceReadFile = (replacement: object) => {
    Object.assign(fsPromises, { readFile: replacement })
    syncBuiltinESMExports()
  }
  t.teardown(() => replaceReadFile(readFile))
  for (const [setting, warnings] of [
    ['always [madvise] never', 0],
    ['always madvise [never]', 1]
  ] as const) {
    replaceReadFile((path: string, ...rest: never[]) =>
      path.includes('transparent_hugepage') ? Promise.resolve(setting) : readFile(path, ...rest)
    )
    const lines: string[] = []
    await build(t, {}, { logStream: { write: (line) => void lines.push(line) } })
    t.equal(lines.filter((line) => line.includes('transparent huge pages are off')).length, warnings, setting)
  }
})
