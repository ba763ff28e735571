import { readFileSync, writeFileSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import { verify } from '@node-rs/argon2'
import type { FastifyInstance } from 'fastify'
import t, { type Test } from 'tap'
import { type Fault, FaultProxy } from './fault-proxy.js'
import { build, cookieOf, markerKey, post, redis, signUpBody, stores, userRow } from './helper.js'

/*
 * Each await of a sign-up × each fault of its store. What is found is the table of docs/guarantees.md: this file holds
 * the two together, and `npm run guarantees` writes the table anew.
 */

const storeTimeoutMs = 750
/** With the lease that this gives, a retry can still be made in it when the store is used again. */
const hashMaxWaitMs = 2_500
/** The life that each code has left when it is taken. */
const codeLifeMs = 100_000

const faults: Record<string, Fault> = {
  'delayed, in time': { kind: 'delay', ms: 100 },
  'stalled: nothing passes any more': { kind: 'stall' },
  'down: connections end, new ones are refused': { kind: 'refuse' },
  'reset before the request': { kind: 'reset' },
  'cut after 3 bytes of the reply': { kind: 'cut', bytes: 3 },
  'the reply is lost': { kind: 'drop reply' }
}

type Body = Awaited<ReturnType<typeof signUpBody>>

/** A service with a proxy in front of each of its stores, and the sign-up that meets a fault. */
interface Scene {
  app: FastifyInstance
  redisProxy: FaultProxy
  postgresProxy: FaultProxy
  body: Body
}

/** A round trip of a sign-up. */
interface RoundTrip {
  name: string
  store: 'redis' | 'postgres'
  /** What its request holds, and the requests before it that do so, too. */
  needle: (body: Body) => string
  skip?: number
  /** What comes before the sign-up. Returns its headers, if it has any. */
  prepare?: (scene: Scene) => Promise<Record<string, string>>
  /** What the last retry is answered, if not with success. */
  ends?: number[]
}

const marker = ({ mobile }: Body) => markerKey(mobile)

const roundTrips: RoundTrip[] = [
  { name: 'the code is taken', store: 'redis', needle: marker },
  { name: 'the INSERT', store: 'postgres', needle: () => 'insert_user' },
  {
    name: 'the code is put back, after an INSERT that was reset',
    store: 'redis',
    needle: marker,
    skip: 1,
    async prepare({ postgresProxy }) {
      postgresProxy.strike('insert_user', { kind: 'reset' })
      return {}
    }
  },
  { name: 'the session is stored, and the marker says done', store: 'redis', needle: () => 'session:' },
  {
    name: 'the former session ends, and the marker says done',
    store: 'redis',
    needle: () => 'session:',
    prepare: async ({ app }) => ({ cookie: cookieOf(await post(app, await signUpBody())) })
  },
  {
    name: 'a retry looks for the row of an unknown INSERT',
    store: 'postgres',
    needle: () => 'find_user',
    async prepare({ app, postgresProxy, body }) {
      postgresProxy.strike('insert_user', { kind: 'drop reply' })
      await post(app, body)
      await untilUsable(app)
      return {}
    }
  },
  {
    name: 'a retry looks for the row of a sign-up that is done',
    store: 'postgres',
    needle: () => 'find_user',
    async prepare({ app, body }) {
      await post(app, body)
      return {}
    }
  },
  {
    name: 'the session of a replay is stored',
    store: 'redis',
    needle: () => 'session:',
    async prepare({ app, body }) {
      await post(app, body)
      return {}
    }
  },
  {
    name: 'the attempt ends, after a conflict',
    store: 'redis',
    needle: marker,
    skip: 1,
    async prepare({ app, body }) {
      await post(app, await signUpBody({ mobile: body.mobile }))
      await redis.set(`sms_code_${body.mobile}`, body.sms_code)
      return {}
    },
    ends: [409, 422]
  }
]

/** Until both stores are used again: at most 2 s (section 6 of the design). */
async function untilUsable(app: FastifyInstance): Promise<number> {
  const startedAt = Date.now()
  while ((await post(app, await signUpBody())).statusCode !== 201) await sleep(20)
  return Date.now() - startedAt
}

const codeOf = async ({ mobile, sms_code }: Body) => {
  const state = JSON.parse((await redis.get(markerKey(mobile))) ?? '{}').state
  if ((await redis.get(`sms_code_${mobile}`)) !== sms_code) return state ?? 'gone'
  const ttlMs = await redis.pttl(`sms_code_${mobile}`)
  if (ttlMs > codeLifeMs || ttlMs < codeLifeMs - 20_000) return `${ttlMs} ms left`
  return state === undefined ? 'there' : `there, ${state}`
}

const answer = (reply: Awaited<ReturnType<typeof post>>) => {
  const { errno, data } = reply.json()
  const replayed = reply.headers['idempotent-replayed'] === 'true' ? ', replayed' : ''
  return `${reply.statusCode}${errno === '0' ? '' : ` ${errno}`}${data?.session === false ? ', session false' : ''}${replayed}`
}

/** Brings one fault about at one round trip; returns the row of the table. */
async function strike(t: Test, trip: RoundTrip, faultName: string, fault: Fault): Promise<string[]> {
  const [redisProxy, postgresProxy] = await Promise.all([
    FaultProxy.open(stores.redisUrl),
    FaultProxy.open(stores.databaseUrl)
  ])
  t.teardown(() => Promise.all([redisProxy.close(), postgresProxy.close()]))
  const app = await build(t, {
    REDIS_URL: redisProxy.url,
    DATABASE_URL: postgresProxy.url,
    STORE_TIMEOUT_MS: `${storeTimeoutMs}`,
    HASH_MAX_WAIT_MS: `${hashMaxWaitMs}`,
    HASH_THREADS: '1'
  })
  const body = await signUpBody()
  const scene = { app, redisProxy, postgresProxy, body }
  const proxy = trip.store === 'redis' ? redisProxy : postgresProxy
  const what = `${trip.name}: ${faultName}`

  const headers = await trip.prepare?.(scene)
  await redis.pexpire(`sms_code_${body.mobile}`, codeLifeMs)
  const struck = proxy.strike(trip.needle(body), fault, trip.skip)
  const startedAt = Date.now()
  const reply = await post(app, body, headers)
  t.ok(Date.now() - startedAt < 6 * storeTimeoutMs, `${what}: answered in time`)
  await struck
  const row = [trip.name, faultName, answer(reply), await codeOf(body), `${(await userRow(body.mobile)).length}`]

  await proxy.heal()
  t.ok((await untilUsable(app)) < 2_000, `${what}: used again within 2 s`)
  let retry = await post(app, body)
  const retries = [answer(retry)]
  if (retry.statusCode === 503) {
    t.strictSame([retry.json().errno, retry.headers['retry-after']], ['4500', '1'], `${what}: held by its marker`)
    while (retry.statusCode === 503) {
      await sleep(100)
      retry = await post(app, body)
    }
    retries.push(answer(retry))
  }

  t.ok((trip.ends ?? [201]).includes(retry.statusCode), `${what}: the retry ends in ${retry.statusCode}`)
  const rows = await userRow(body.mobile)
  t.equal(rows.length, 1, `${what}: one row`)
  if (retry.statusCode === 201) {
    t.equal(retry.json().data.user_id, rows[0].id, `${what}: with this id`)
    t.equal(await verify(rows[0].password_hash, body.password), true, `${what}: and this password`)
    t.equal(retry.json().data.session, true, `${what}: and a session`)
  }
  return [...row, retries.join('; after the lease ')]
}

const table: string[][] = []

for (const trip of roundTrips) {
  t.test(`G4, G5: a fault when ${trip.name}`, { timeout: 60_000 }, async (t) => {
    const rows = Object.entries(faults).map(([name, fault]) => strike(t, trip, name, fault))
    table.push(...(await Promise.all(rows)))
  })
}

t.test('docs/guarantees.md has the table of what was found', async (t) => {
  const file = new URL('../docs/guarantees.md', import.meta.url)
  const document = readFileSync(file, 'utf8')
  const [before, after] = document.split(/(?<=<!-- the matrix -->\n)[\s\S]*(?=<!-- its end -->)/)
  const lines = table.map((row) => `| ${row.join(' | ')} |\n`).join('')
  const heading =
    '| when | its store is | answer | the code then | rows | the same request again |\n|---|---|---|---|---|---|\n'
  const now = `${before}${heading}${lines}${after}`
  if (process.env.WRITE_GUARANTEES) writeFileSync(file, now)
  else t.equal(document, now)
})
