import { setTimeout as sleep } from 'node:timers/promises'
import { verify } from '@node-rs/argon2'
import t, { type Test } from 'tap'
import { client, type Reply, statusAndErrno } from '../testkit/client.js'
import type { Fault, FaultProxy } from '../testkit/fault-proxy.js'
import { checkGeneratedPart, markdownTable } from '../testkit/generated-docs.js'
import { claimKey, leaseMsOf, type SignUpBody, startTestbed } from '../testkit/testbed.js'
import { until } from '../testkit/until.js'

/*
 * Every round trip of a sign-up with every fault of its store. The results are the fault matrix of docs/guarantees.md:
 * this file compares the two, and `npm run docs` writes the matrix.
 */

const { ageClaim, build, cookieOf, openProxy, redis, signUpBody, userRows } = await startTestbed(t)

interface NamedFault {
  name: string
  fault: Fault
  /** The request waits for a timeout, so the timeout must be short. */
  isTimeout?: true
}

const faults: NamedFault[] = [
  { name: 'the request is delayed, within the timeout', fault: { kind: 'delay', ms: 100 } },
  { name: 'the store stalls: it answers nothing any more', fault: { kind: 'stall' }, isTimeout: true },
  { name: 'the store is down: connections are reset, new ones refused', fault: { kind: 'refuse' } },
  { name: 'the connection is reset before the request', fault: { kind: 'reset' } },
  { name: 'the connection is closed after 3 bytes of the reply', fault: { kind: 'cut', bytes: 3 } },
  { name: 'the reply is lost', fault: { kind: 'drop reply' }, isTimeout: true }
]

/** Long enough for the round trips without a fault, however busy the machine is. */
const shortTimeoutMs = 2_000

/** Longer than {@link answerMaxMs}: a request that waits for it fails its test. */
const longTimeoutMs = 60_000

/**
 * An answer comes within five round trips, each at most the timeout: 10 s with the short one. The rest is for a busy
 * machine.
 */
const answerMaxMs = 30_000

/** The promise is 2 s: the longest pause between two attempts to connect is 1 s. The rest is for a busy machine. */
const recoveryMaxMs = 20_000

/** So long that no lease expires during a test. `ageClaim` ends it. */
const hashMaxWaitMs = 600_000

/** An instance of the service with a proxy in front of each of its stores. */
interface Instance extends ReturnType<typeof client> {
  proxies: { redis: FaultProxy; postgres: FaultProxy }
  leaseMs: number
}

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
  /** The statuses with which the last retry may be answered; 201 by default. */
  finalStatuses?: number[]
}

const claim = ({ mobile }: SignUpBody) => claimKey(mobile)

const roundTrips: RoundTrip[] = [
  { name: 'the request holds the code', store: 'redis', needle: claim },
  { name: 'the INSERT', store: 'postgres', needle: () => 'insert_user' },
  {
    name: 'the code is released, after an INSERT whose connection was reset',
    store: 'redis',
    needle: claim,
    skip: 1,
    arm: ({ proxies }) => proxies.postgres.strike('insert_user', { kind: 'reset' })
  },
  { name: 'the session is stored and the code released', store: 'redis', needle: () => 'session:' },
  {
    name: 'the session is stored, a former session destroyed and the code released',
    store: 'redis',
    needle: () => 'session:',
    prepare: async ({ signUp }) => ({ cookie: cookieOf(await signUp(await signUpBody())) })
  },
  {
    name: 'a repeat reads the row of an INSERT whose outcome was unknown',
    store: 'postgres',
    needle: () => 'find_user',
    async prepare({ proxies, signUp }, body) {
      // The INSERT is the only statement with the mobile.
      proxies.postgres.strike(body.mobile, { kind: 'cut', bytes: 3 })
      await signUp(body)
      await until('the row is committed', async () => (await userRows(body.mobile)).length === 1)
      return {}
    }
  },
  {
    name: 'a repeat reads the row of a completed sign-up',
    store: 'postgres',
    needle: () => 'find_user',
    async prepare({ signUp }, body) {
      await signUp(body)
      return {}
    }
  },
  {
    name: 'the session of a repeat is stored',
    store: 'redis',
    needle: () => 'session:',
    async prepare({ signUp }, body) {
      await signUp(body)
      return {}
    }
  },
  {
    name: 'the code is released, after a conflict',
    store: 'redis',
    needle: claim,
    skip: 1,
    async prepare({ signUp }, body) {
      await signUp(await signUpBody({ mobile: body.mobile }))
      await redis.set(`sms_code_${body.mobile}`, body.sms_code)
      return {}
    },
    finalStatuses: [409]
  }
]

async function buildInstance(t: Test, isTimeout: boolean): Promise<Instance> {
  const [redisProxy, postgresProxy] = [await openProxy(t, 'REDIS_URL'), await openProxy(t, 'DATABASE_URL')]
  const storeTimeoutMs = isTimeout ? shortTimeoutMs : longTimeoutMs
  const app = await build(t, {
    REDIS_URL: redisProxy.url,
    DATABASE_URL: postgresProxy.url,
    STORE_TIMEOUT_MS: `${storeTimeoutMs}`,
    HASH_MAX_WAIT_MS: `${hashMaxWaitMs}`
  })
  return {
    ...client(app),
    proxies: { redis: redisProxy, postgres: postgresProxy },
    leaseMs: leaseMsOf({ hashMaxWaitMs, storeTimeoutMs })
  }
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
    until > 0 ? 'held' : 'released',
    ...(may_have_written ? ['may have written'] : []),
    ...(used_by === undefined ? [] : [used_by === '' ? 'used in vain' : 'used'])
  ].join(', ')
}

function describeReply(reply: Reply): string {
  const { errno, data } = reply.json()
  return [
    errno === '0' ? `${reply.statusCode}` : `${reply.statusCode} ${errno}`,
    ...(data?.session === false ? ['session false'] : []),
    ...(reply.headers['idempotent-replayed'] === 'true' ? ['replayed'] : [])
  ].join(', ')
}

/** Causes one fault in one round trip of a sign-up, and sends the same request again. @returns a row of the matrix */
async function causeFault(
  t: Test,
  instance: Instance,
  patient: Instance,
  trip: RoundTrip,
  { name, fault }: NamedFault
) {
  const body = await signUpBody()
  const { signUp } = instance
  const proxy = instance.proxies[trip.store]
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
    await ageClaim(body.mobile, instance.leaseMs)
    retry = await signUp(body)
    retries += `; after the lease ${describeReply(retry)}`
  }

  t.ok((trip.finalStatuses ?? [201]).includes(retry.statusCode), `the last retry gets ${retry.statusCode}`)
  const rows = await userRows(body.mobile)
  t.equal(rows.length, 1, 'the mobile has one row')
  if (retry.statusCode === 201) {
    const { user_id, session } = retry.json().data
    t.equal(user_id, rows[0].id, 'the retry gets the id of the row')
    t.equal(await verify(rows[0].password_hash, body.password), true, 'the row has the password')
    t.equal(session, true, 'the retry gets a session')
  }
  return [trip.name, name, ...stateAfter, retries]
}

/** The rows of the matrix, by round trip and fault. */
const matrix = new Map(roundTrips.map(({ name }) => [name, new Map<string, string[]>()]))

t.test('G4, G5: a sign-up with a fault of a store, and its retry', { timeout: 110_000 }, async (t) => {
  // An instance for each fault of each store. They work at the same time, because they wait more than they compute. They
  // are built before: a build could delay the others until they time out.
  const patient = await buildInstance(t, false)
  const series: { store: RoundTrip['store']; fault: NamedFault; instance: Instance }[] = []
  for (const store of ['redis', 'postgres'] as const) {
    for (const fault of faults) {
      series.push({ store, fault, instance: await buildInstance(t, fault.isTimeout === true) })
    }
  }
  t.jobs = series.length
  for (const { store, fault, instance } of series) {
    t.test(`${store}: ${fault.name}`, async (t) => {
      for (const trip of roundTrips.filter((trip) => trip.store === store)) {
        await t.test(trip.name, async (t) => {
          matrix.get(trip.name)?.set(fault.name, await causeFault(t, instance, patient, trip, fault))
        })
      }
    })
  }
})

t.test('docs/guarantees.md has the fault matrix that was found', async (t) => {
  const heading = ['round trip', 'fault of its store', 'answer', 'the code then', 'rows', 'the same request again']
  const rows = [...matrix.values()].flatMap((byFault) => faults.flatMap(({ name }) => [byFault.get(name) ?? []]))
  checkGeneratedPart(t, 'docs/guarantees.md', 'matrix', markdownTable(heading, rows))
})
