import { setTimeout as sleep } from 'node:timers/promises'
import { verify } from '@node-rs/argon2'
import t, { type Test } from 'tap'
import { client, type Reply, statusAndErrno } from '../testkit/client.js'
import type { Fault, FaultProxy } from '../testkit/fault-proxy.js'
import { checkGeneratedPart, markdownTable } from '../testkit/generated-docs.js'
import { claimKey, type SignUpBody, startTestbed } from '../testkit/testbed.js'
import { until } from '../testkit/until.js'

/*
 * Every round trip of a sign-up with every fault of its store. The results are the fault matrix of docs/guarantees.md:
 * this file compares the two, and `npm run docs` writes the matrix.
 */

const { ageClaim, build, cookieOf, openProxy, redis, signUpBody, userRows } = await startTestbed(t)

const faults: { name: string; meaning: string; fault: Fault; isTimeout?: true }[] = [
  { name: 'delayed', meaning: 'the request comes late, within the timeout', fault: { kind: 'delay', ms: 100 } },
  { name: 'stalled', meaning: 'the store answers nothing from now on', fault: { kind: 'stall' }, isTimeout: true },
  { name: 'down', meaning: 'all connections are reset, new ones refused', fault: { kind: 'refuse' } },
  { name: 'reset', meaning: 'this connection is, before the request', fault: { kind: 'reset' } },
  { name: 'cut', meaning: 'it is closed within the reply', fault: { kind: 'cut', bytes: 3 } },
  { name: 'unanswered', meaning: 'only the reply is lost', fault: { kind: 'drop reply' }, isTimeout: true }
]

/** Long enough for the round trips without a fault, however busy the machine is. */
const shortTimeoutMs = 2_000

/** A request that waits for it fails its test. */
const longTimeoutMs = 60_000

/** The promises are five round trips, 10 s with the short timeout, and 2 s. The rest is for a busy machine. */
const [answerMaxMs, recoveryMaxMs] = [30_000, 40_000]

/** So long that no lease expires during a test. `ageClaim` ends it. */
const hashMaxWaitMs = 600_000

/** An instance of the service with a proxy in front of each of its stores. */
type Instance = ReturnType<typeof client> & Record<RoundTrip['store'], FaultProxy>

interface RoundTrip {
  name: string
  store: 'redis' | 'postgres'
  /** Returns what the request to the store contains. */
  needle: (body: SignUpBody) => string
  /** How many earlier requests of the sign-up contain it, too. */
  skip?: number
  /** Prepares the sign-up, with requests to an instance that does not time out. Returns its headers. */
  prepare?: (patient: Instance, body: SignUpBody) => Promise<Record<string, string>>
  /** Arms a further fault, before the sign-up. */
  arm?: (instance: Instance) => void
  /** The status of the last retry, if it is not 201. */
  finalStatus?: number
}

const claim = ({ mobile }: SignUpBody) => claimKey(mobile)

async function signUpBefore({ signUp }: Instance, body: SignUpBody) {
  await signUp(body)
  return {}
}

const roundTrips: RoundTrip[] = [
  { name: 'hold the code', store: 'redis', needle: claim },
  { name: 'INSERT', store: 'postgres', needle: () => 'insert_user' },
  {
    name: 'release the code after a failed INSERT',
    store: 'redis',
    needle: claim,
    skip: 1,
    arm: ({ postgres }) => postgres.strike('insert_user', { kind: 'reset' })
  },
  { name: 'store the session, release the code', store: 'redis', needle: () => 'session:' },
  {
    name: 'the same, and destroy a former session',
    store: 'redis',
    needle: () => 'session:',
    prepare: async ({ signUp }) => ({ cookie: cookieOf(await signUp(await signUpBody())) })
  },
  {
    name: 'a repeat after an INSERT of unknown outcome: find the row',
    store: 'postgres',
    needle: () => 'find_user',
    async prepare(patient, body) {
      // The INSERT is the only statement with the mobile.
      patient.postgres.strike(body.mobile, { kind: 'cut', bytes: 3 })
      await signUpBefore(patient, body)
      await until('the row is committed', async () => (await userRows(body.mobile)).length === 1)
      return {}
    }
  },
  {
    name: 'a repeat after a success: find the row',
    store: 'postgres',
    needle: () => 'find_user',
    prepare: signUpBefore
  },
  { name: 'a repeat: store the session', store: 'redis', needle: () => 'session:', prepare: signUpBefore },
  {
    name: 'release the code after a 409',
    store: 'redis',
    needle: claim,
    skip: 1,
    async prepare({ signUp }, body) {
      await signUp(await signUpBody({ mobile: body.mobile }))
      await redis.set(`sms_code_${body.mobile}`, body.sms_code)
      return {}
    },
    finalStatus: 409
  }
]

async function buildInstance(t: Test, storeTimeoutMs: number): Promise<Instance> {
  const [redis, postgres] = [await openProxy(t, 'REDIS_URL'), await openProxy(t, 'DATABASE_URL')]
  const timeouts = { STORE_TIMEOUT_MS: `${storeTimeoutMs}`, HASH_MAX_WAIT_MS: `${hashMaxWaitMs}` }
  const app = await build(t, { REDIS_URL: redis.url, DATABASE_URL: postgres.url, ...timeouts })
  return { ...client(app), redis, postgres }
}

/** Waits until a sign-up succeeds, so both stores are used again. */
const untilUsable = ({ signUp }: Instance) =>
  until('both stores are used again', async () => {
    if ((await signUp(await signUpBody())).statusCode === 201) return true
    // Many instances wait at the same time. Without a pause they would take the whole processor.
    await sleep(50)
    return false
  })

/** Describes where the code is, and what its claim says. */
async function describeCode({ mobile, sms_code }: SignUpBody): Promise<string> {
  if ((await redis.get(`sms_code_${mobile}`)) === sms_code) return 'untouched'
  const stored = await redis.get(claimKey(mobile))
  if (stored === null) return 'gone'
  const { until, may_have_written, used_by } = JSON.parse(stored)
  return [
    ...(until > 0 ? ['held'] : []),
    ...(may_have_written ? ['may have written'] : []),
    ...(used_by === undefined ? [] : [used_by === '' ? 'used in vain' : 'used'])
  ].join(', ')
}

function describeReply(reply: Reply): string {
  const { errno, data } = reply.json()
  return [
    errno === '0' ? `${reply.statusCode}` : `${reply.statusCode} ${errno}`,
    ...(data?.session === false ? ['no session'] : []),
    ...(reply.headers['idempotent-replayed'] === 'true' ? ['replayed'] : [])
  ].join(', ')
}

/** Causes one fault in one round trip of a sign-up, and sends the same request again. @returns the cells of the matrix */
async function causeFault(t: Test, instance: Instance, patient: Instance, trip: RoundTrip, fault: Fault) {
  const body = await signUpBody()
  const { signUp } = instance
  const proxy = instance[trip.store]
  const headers = await trip.prepare?.(patient, body)
  trip.arm?.(instance)

  const struck = proxy.strike(trip.needle(body), fault, trip.skip)
  const sentAt = Date.now()
  const reply = await signUp(body, headers && { headers })
  t.ok(Date.now() - sentAt < answerMaxMs, 'the answer comes in time')
  await struck
  const stateAfter = [describeReply(reply), await describeCode(body), `${(await userRows(body.mobile)).length}`]

  await proxy.heal()
  const healedAt = Date.now()
  await untilUsable(instance)
  t.ok(Date.now() - healedAt < recoveryMaxMs, 'the store is used again in time')

  let retry = await signUp(body)
  let retries = describeReply(retry)
  if (retry.statusCode === 503) {
    t.strictSame([...statusAndErrno(retry), retry.headers['retry-after']], [503, '4500', '1'], 'the code is held')
    await ageClaim(body.mobile, 2 * hashMaxWaitMs)
    retry = await signUp(body)
    retries += `, after the lease ${describeReply(retry)}`
  }

  t.equal(retry.statusCode, trip.finalStatus ?? 201, 'the last retry')
  const rows = await userRows(body.mobile)
  t.equal(rows.length, 1, 'the mobile has one row')
  if (retry.statusCode === 201) {
    const { user_id, session } = retry.json().data
    t.equal(user_id, rows[0].id, 'the retry gets the id of the row')
    t.equal(await verify(rows[0].password_hash, body.password), true, 'the row has the password')
    t.equal(session, true, 'the retry gets a session')
  }
  return [...stateAfter, retries]
}

/** The cells of the matrix, by round trip and fault. */
const matrix = new Map(roundTrips.map(({ name }) => [name, new Map<string, string[]>()]))

t.test('G4, G5: a sign-up with a fault of a store, and its retry', { timeout: 110_000 }, async (t) => {
  // An instance for each fault of each store. They work at the same time, because they wait more than they compute. They
  // are built before: a build could delay the others until they time out.
  const patient = await buildInstance(t, longTimeoutMs)
  const series: { store: RoundTrip['store']; fault: (typeof faults)[number]; instance: Instance }[] = []
  for (const store of ['redis', 'postgres'] as const)
    for (const fault of faults)
      series.push({ store, fault, instance: await buildInstance(t, fault.isTimeout ? shortTimeoutMs : longTimeoutMs) })
  t.jobs = series.length
  for (const { store, fault, instance } of series) {
    t.test(`${store}: ${fault.name}`, async (t) => {
      for (const trip of roundTrips.filter((trip) => trip.store === store)) {
        await t.test(trip.name, async (t) => {
          matrix.get(trip.name)?.set(fault.name, await causeFault(t, instance, patient, trip, fault.fault))
        })
      }
    })
  }
})

t.test('docs/guarantees.md has the fault matrix that was found', async (t) => {
  const legend = faults.map(({ name, meaning }) => `*${name}*: ${meaning}`).join('; ')
  // Faults with the same cells share a row, and so do round trips of which all rows are the same.
  const rowsByTrips = new Map<string, string[]>()
  for (const [trip, cellsByFault] of matrix) {
    const namesByCells = new Map<string, string[]>()
    for (const { name } of faults) {
      const cells = (cellsByFault.get(name) ?? []).join(' | ')
      namesByCells.set(cells, [...(namesByCells.get(cells) ?? []), name])
    }
    const rows = [...namesByCells].map(([cells, names]) => `${names.join(', ')} | ${cells}`).join('\n')
    rowsByTrips.set(rows, [...(rowsByTrips.get(rows) ?? []), trip])
  }
  const rows = [...rowsByTrips].flatMap(([rows, trips]) =>
    rows.split('\n').map((row, index) => [index === 0 ? trips.join('; ') : '', row])
  )
  const heading = ['round trip', 'fault', 'answer', 'code then', 'rows', 'the same request again']
  checkGeneratedPart(t, 'docs/guarantees.md', 'matrix', `${legend}.\n\n${markdownTable(heading, rows)}`)
})
