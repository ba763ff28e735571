import { setTimeout as sleep } from 'node:timers/promises'
import { verify } from '@node-rs/argon2'
import t, { type Test } from 'tap'
import { client, type Reply, type RequestOptions, statusAndErrno } from '../testkit/client.js'
import type { Fault, FaultProxy } from '../testkit/fault-proxy.js'
import { checkGeneratedPart, markdownTable } from '../testkit/generated-docs.js'
import { claimKey, type SignUpBody, sessionKeyOf, startTestbed } from '../testkit/testbed.js'
import { until } from '../testkit/until.js'

/*
 * Every round trip of a sign-up, a login by code and a deletion with every fault of its store. The results are the fault matrix of
 * docs/guarantees.md: this file compares the two, and `npm run docs` writes the matrix.
 */

const { ageClaim, build, cookieOf, issueCode, openProxy, redis, signUpBody, userRows } = await startTestbed(t)

const faults: { name: string; meaning: string; fault: Fault; isTimeout?: true }[] = [
  {
    name: 'delayed',
    meaning: 'the request comes late, within the timeout, and nothing changes',
    fault: { kind: 'delay', ms: 100 }
  },
  { name: 'stalled', meaning: 'the store answers nothing from now on', fault: { kind: 'stall' }, isTimeout: true },
  { name: 'down', meaning: 'all connections are reset, new ones refused', fault: { kind: 'refuse' } },
  { name: 'reset', meaning: 'this connection is, before the request', fault: { kind: 'reset' } },
  { name: 'cut', meaning: 'it is closed within the reply', fault: { kind: 'cut', bytes: 1 } },
  { name: 'unanswered', meaning: 'only the reply is lost', fault: { kind: 'drop reply' }, isTimeout: true }
]

/** Long enough for the round trips without a fault, however busy the machine is. */
const shortTimeoutMs = 3_000

/** A request that waits for it fails its test. */
const longTimeoutMs = 60_000

/** The promises are five round trips, 15 s with the short timeout, and 2 s. The rest is for a busy machine. */
const [answerMaxMs, recoveryMaxMs] = [30_000, 40_000]

/** So long that no lease expires during a test. `ageClaim` ends it. */
const hashMaxWaitMs = 600_000

/** An instance of the service with a proxy in front of each of its stores. */
type Instance = ReturnType<typeof client> & Record<RoundTrip['store'], FaultProxy>

/** Prepares a request with an instance that does not time out. Returns a session cookie, if the request is to carry one. */
type Prepare = (patient: Instance, body: SignUpBody) => Promise<string | undefined>

/** A request with a code. */
interface Operation {
  send: (instance: Instance, body: SignUpBody, options?: RequestOptions) => Promise<Reply>
  prepare?: Prepare
  finalStatus: number
  /** How many rows the mobile has at the end. */
  finalRows: number
  roundTrips: RoundTrip[]
}

interface RoundTrip {
  name: string
  store: 'redis' | 'postgres'
  /** Returns what the request to the store contains. */
  needle: (body: SignUpBody) => string
  /** How many earlier requests of the operation contain it, too. */
  skip?: number
  /** Instead of that of the operation. */
  prepare?: Prepare
  /** Arms a further fault, before the request. */
  arm?: (instance: Instance) => void
  /** The status of the last retry, if it is not that of the operation. */
  finalStatus?: number
}

const claim = ({ mobile }: SignUpBody) => claimKey(mobile)

const signUpBefore: Prepare = async ({ signUp }, body) => {
  await signUp(body)
}

/** Signs up with another code. */
async function register({ signUp }: Instance, { sms_code, ...body }: SignUpBody) {
  const reply = await signUp(await signUpBody(body))
  await issueCode(body.mobile, sms_code)
  return cookieOf(reply)
}

const signingUp: Operation = {
  send: ({ signUp }, body, options) => signUp(body, options),
  finalStatus: 201,
  finalRows: 1,
  roundTrips: [
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
      prepare: async ({ signUp }) => cookieOf(await signUp(await signUpBody()))
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
      async prepare({ signUp }, { mobile, sms_code }) {
        await signUp(await signUpBody({ mobile }))
        await issueCode(mobile, sms_code)
      },
      finalStatus: 409
    }
  ]
}

const loggingIn: Operation = {
  send: ({ logIn }, { mobile, sms_code }, options) => logIn({ mobile, sms_code }, options),
  prepare: register,
  finalStatus: 201,
  finalRows: 1,
  roundTrips: [
    { name: 'login by code: hold the code', store: 'redis', needle: claim },
    { name: 'login by code: find the user', store: 'postgres', needle: () => 'find_user' },
    { name: 'login by code: store the session, release the code', store: 'redis', needle: () => 'session:' }
  ]
}

const deletion: Operation = {
  send: ({ deleteAccount }, { mobile, sms_code }, options) => deleteAccount({ mobile, sms_code }, options),
  prepare: register,
  finalStatus: 200,
  finalRows: 0,
  roundTrips: [
    { name: 'deletion: hold the code', store: 'redis', needle: claim },
    { name: 'deletion: find the user', store: 'postgres', needle: () => 'find_user' },
    { name: 'deletion: begin an epoch', store: 'redis', needle: () => 'sessions_of:' },
    { name: 'read the older sessions', store: 'redis', needle: () => 'session:' },
    { name: 'destroy them', store: 'redis', needle: () => 'session:', skip: 1 },
    { name: 'remove them from the index', store: 'redis', needle: () => 'sessions_of:', skip: 1 },
    { name: 'deletion: DELETE', store: 'postgres', needle: () => 'delete_user' },
    { name: 'deletion: forget failed logins', store: 'redis', needle: () => 'login_failures:' },
    { name: 'deletion: release the code', store: 'redis', needle: claim, skip: 1 }
  ]
}

const operations = [signingUp, loggingIn, deletion].map(({ roundTrips, ...operation }) =>
  roundTrips.map((trip) => ({ ...operation, ...trip }))
)

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
  const words = [
    ...(until > 0 ? ['held'] : []),
    ...(may_have_written ? ['may have written'] : []),
    ...(used_by === undefined ? [] : [used_by === '' ? 'used in vain' : 'used'])
  ]
  return words.join(', ') || 'unused'
}

function describeReply(reply: Reply): string {
  const { errno, data } = reply.json()
  return [
    errno === '0' ? `${reply.statusCode}` : `${reply.statusCode} ${errno}`,
    ...(data?.session === false ? ['no session'] : []),
    ...(reply.headers['idempotent-replayed'] === 'true' ? ['replayed'] : [])
  ].join(', ')
}

/** Causes one fault in one round trip, and sends the same request again. @returns the cells of the matrix */
async function causeFault(
  t: Test,
  instance: Instance,
  patient: Instance,
  trip: RoundTrip & Omit<Operation, 'roundTrips'>,
  fault: Fault
) {
  const { send } = trip
  const body = await signUpBody()
  const cookie = await trip.prepare?.(patient, body)
  const options = cookie === undefined ? {} : { headers: { cookie } }
  trip.arm?.(instance)

  const proxy = instance[trip.store]
  const struck = proxy.strike(trip.needle(body), fault, trip.skip)
  const sentAt = Date.now()
  const reply = await send(instance, body, options)
  t.ok(Date.now() - sentAt < answerMaxMs, 'the answer comes in time')
  await struck
  if (fault.kind === 'delay' && trip.arm === undefined)
    t.equal(reply.statusCode, trip.finalStatus, 'a delay changes nothing')
  const stateAfter = [describeReply(reply), await describeCode(body), `${(await userRows(body.mobile)).length}`]

  await proxy.heal()
  const healedAt = Date.now()
  await untilUsable(instance)
  t.ok(Date.now() - healedAt < recoveryMaxMs, 'the store is used again in time')

  let retry = await send(instance, body, options)
  let retries = describeReply(retry)
  if (retry.statusCode === 503) {
    t.strictSame([...statusAndErrno(retry), retry.headers['retry-after']], [503, '4500', '1'], 'the code is held')
    await ageClaim(body.mobile, 2 * hashMaxWaitMs)
    retry = await send(instance, body, options)
    retries += `, after the lease ${describeReply(retry)}`
  }

  t.equal(retry.statusCode, trip.finalStatus, 'the last retry')
  const rows = await userRows(body.mobile)
  t.equal(rows.length, trip.finalRows, 'the rows of the mobile')
  if (retry.statusCode === 201) {
    const { user_id, session } = retry.json().data
    t.equal(user_id, rows[0].id, 'the retry gets the id of the row')
    t.equal(await verify(rows[0].password_hash, body.password), true, 'the row has the password')
    t.equal(session, true, 'the retry gets a session')
    t.equal((await patient.whoAmI(cookieOf(retry))).json().data.user_id, user_id, 'which is that of the user')
  }
  if (cookie !== undefined) {
    t.equal((await patient.whoAmI(cookie)).statusCode, 401, 'the former session is refused')
    t.equal(await redis.exists(sessionKeyOf(cookie)), 0, 'and it is not stored, for other services')
  }
  return [...stateAfter, retries]
}

/** The cells of the matrix, by round trip and fault. */
const matrix = new Map(operations.flat().map(({ name }) => [name, new Map<string, string[]>()]))

t.test('G4, G5: a request with a fault of a store, and its retry', { timeout: 110_000 }, async (t) => {
  // An instance for each fault of each store. They work at the same time, because they wait more than they compute. They
  // are built before: a build could delay the others until they time out. The slow faults have one for each operation.
  const patient = await buildInstance(t, longTimeoutMs)
  const series = []
  for (const store of ['redis', 'postgres'] as const)
    for (const fault of faults)
      for (const operation of fault.isTimeout ? operations : [operations.flat()])
        series.push({
          name: `${store}: ${fault.name}`,
          trips: operation.filter((trip) => trip.store === store),
          fault,
          instance: await buildInstance(t, fault.isTimeout ? shortTimeoutMs : longTimeoutMs)
        })
  t.jobs = series.length
  for (const { name, trips, fault, instance } of series) {
    t.test(name, async (t) => {
      for (const trip of trips) {
        await t.test(trip.name, async (t) => {
          matrix.get(trip.name)?.set(fault.name, await causeFault(t, instance, patient, trip, fault.fault))
        })
      }
    })
  }
})

t.test('docs/guarantees.md has the fault matrix that was found', async (t) => {
  const legend = faults.map(({ name, meaning }) => `*${name}*: ${meaning}`).join('; ')
  // Faults with the same cells share a row, and so do round trips of which all rows are the same. A row with the delay alone is left out.
  const rowsByTrips = new Map<string, string[]>()
  for (const [trip, cellsByFault] of matrix) {
    const namesByCells = new Map<string, string[]>()
    for (const { name } of faults) {
      const cells = (cellsByFault.get(name) ?? []).join(' | ')
      namesByCells.set(cells, [...(namesByCells.get(cells) ?? []), name])
    }
    const rows = [...namesByCells]
      .filter(([, names]) => names.join() !== 'delayed')
      .map(([cells, names]) => `${names.join(', ')} | ${cells}`)
      .join('\n')
    rowsByTrips.set(rows, [...(rowsByTrips.get(rows) ?? []), trip])
  }
  const rows = [...rowsByTrips].flatMap(([rows, trips]) =>
    rows.split('\n').map((row, index) => [index === 0 ? trips.join('; ') : '', row])
  )
  const heading = ['round trip', 'fault', 'answer', 'code then', 'rows', 'the same request again']
  checkGeneratedPart(t, 'docs/guarantees.md', 'matrix', `${legend}.\n\n${markdownTable(heading, rows)}`)
})
