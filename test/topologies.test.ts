import { setTimeout as sleep } from 'node:timers/promises'
import type { FastifyInstance } from 'fastify'
import t, { type Test } from 'tap'
import { client, statusAndErrno } from '../testkit/client.js'
import { FaultProxy } from '../testkit/fault-proxy.js'
import { password, type RedisServer, startCluster, startRedis, startSentinel } from '../testkit/redis-topologies.js'
import { ReplicatedPostgres } from '../testkit/replicated-postgres.js'
import { type SignUpBody, startTestbed } from '../testkit/testbed.js'
import { poolerTimeoutMs, startPooler } from '../testkit/topologies.js'
import { isFulfilled, retried, until } from '../testkit/until.js'

/*
 * What is special to Redis Cluster, Sentinel, a Redis behind one address, a Postgres with a standby, and PgBouncer. All other
 * promises are those of the other files, which run on each of them with TESTBED_STORES (testkit/testbed.ts).
 */

const { build, newMobile, signUpBody, stores, cookieOf, userRows } = await startTestbed(t)

// They wait more than they compute. With more at a time, a busy machine is too slow for the short timeouts.
t.jobs = 3

/** For requests that meet a dead server. It bounds the lease of a lost claim, too. */
const impatient = { STORE_TIMEOUT_MS: '2000', HASH_MAX_WAIT_MS: '500', SMS: 'off' }

/** Returns bodies of sign-ups whose codes are on one master. Other masters of a Cluster refuse the key. */
async function bodiesOn({ admin }: RedisServer, count: number): Promise<SignUpBody[]> {
  const bodies: SignUpBody[] = []
  while (bodies.length < count) {
    const body = await signUpBody()
    if (await isFulfilled(admin.set(`sms_code_${body.mobile}`, body.sms_code, 'EX', 300))) bodies.push(body)
  }
  return bodies
}

/**
 * Signs up from eight clients that retry on 503. The fault begins after the first third of the sign-ups, with others in
 * flight. The last third begins after the fault is complete.
 *
 * @param fault gets a function that waits until a sign-up has failed
 */
async function signUpDuring(
  t: Test,
  app: FastifyInstance,
  bodies: readonly SignUpBody[],
  fault: (untilFailure: () => Promise<void>) => Promise<void>
) {
  const failures: string[] = []
  const untilFailure = () => until('a sign-up fails', () => failures.length > 0)
  const remaining = bodies.entries()
  let faultCompleted: Promise<void> | undefined
  async function signUpInTurn() {
    for (const [index, body] of remaining) {
      if (index >= bodies.length / 3) faultCompleted ??= fault(untilFailure)
      if (index >= (2 * bodies.length) / 3) await faultCompleted
      await until('a sign-up succeeds', async () => {
        const reply = await client(app).signUp(body)
        if (reply.statusCode === 201) return true
        failures.push(statusAndErrno(reply).join(' '))
        // The pause of a client before its retry.
        await sleep(50)
        return reply.statusCode !== 503
      })
    }
  }
  await Promise.all(Array.from({ length: 8 }, signUpInTurn))
  for (const failure of failures) t.match(failure, /^503 (4001|4500)$/)
  for (const { mobile } of bodies) t.equal((await userRows(mobile)).length, 1)
}

/** Waits until so many replicas have the codes that were stored on the connection of their master. */
const untilReplicated = ({ admin }: RedisServer, replicaCount: number) =>
  until(`${replicaCount} replicas have the codes`, async () => (await admin.wait(replicaCount, 1_000)) >= replicaCount)

t.test('Redis Cluster', async (t) => {
  const { servers, url: REDIS_URL, failOver } = await startCluster(t)
  const [master, other] = servers
  if (master === undefined || other === undefined) throw new Error('no masters')

  await t.test('a start waits for a master that hangs', async (t) => {
    // Longer than STORE_TIMEOUT_MS: the first command for this master times out before it has a connection.
    await other.admin.client('PAUSE', 3_000, 'ALL')
    const app = await build(t, { ...impatient, REDIS_URL })
    t.equal((await app.inject('/health/ready')).statusCode, 200)
  })

  await t.test('a code whose slot is moving is a 503, and works after the move', async (t) => {
    const { signUp } = client(await build(t, { REDIS_URL }))
    const [body] = await bodiesOn(master, 1)
    const slot = Number(await master.admin.cluster('KEYSLOT', `sms_code_${body?.mobile}`))
    const [masterId, otherId] = await Promise.all([master, other].map(({ admin }) => admin.cluster('MYID')))
    await other.admin.cluster('SETSLOT', slot, 'IMPORTING', `${masterId}`)
    await master.admin.cluster('SETSLOT', slot, 'MIGRATING', `${otherId}`)
    const keys = await master.admin.cluster('GETKEYSINSLOT', slot, 100)
    const options = ['', 0, 5_000, 'AUTH', password, 'KEYS', ...keys]
    await master.admin.call('MIGRATE', '127.0.0.1', other.port, ...options)
    // Redis runs no script on two keys of a moving slot if one of them does not exist.
    t.strictSame(statusAndErrno(await signUp(body)), [503, '4001'])
    for (const { admin } of [other, master]) await admin.cluster('SETSLOT', slot, 'NODE', `${otherId}`)
    t.equal((await signUp(body)).statusCode, 201)
  })

  await t.test('G8: the limits on wrong codes over all mobiles are on another node, and count there', async (t) => {
    const app = await build(t, { REDIS_URL, SMS_GUESS_IP_HOURLY_MAX: '2' })
    const [used, right] = await bodiesOn(master, 2)
    const wrong = { ...right, sms_code: '000000' }
    const statuses: number[] = []
    // The code that is used gives a unit back, its repeat does not. In the end the right code is refused, too.
    for (const body of [wrong, used, used, wrong, wrong, right]) {
      statuses.push((await client(app).signUp(body)).statusCode)
      // No request waits for a refund.
      await app.mobileSignup.inFlight.drain()
    }
    t.strictSame(statuses, [422, 201, 201, 422, 422, 429])
  })

  await t.test('G4: after the kill of a master every failure is a 503, and every code works', async (t) => {
    const app = await build(t, { ...impatient, REDIS_URL })
    const [lost, others] = [await bodiesOn(master, 20), await bodiesOn(other, 10)]
    await untilReplicated(master, 1)
    const bodies = lost.flatMap((body, index) => [body, ...others.slice(index, index + 1)])
    await signUpDuring(t, app, bodies, async (untilFailure) => {
      await master.kill()
      await untilFailure()
      await failOver()
    })
  })
})

t.test('Redis Sentinel', async (t) => {
  const { master, failOver, url: REDIS_URL } = await startSentinel(t)
  const app = await build(t, { ...impatient, REDIS_URL })

  await t.test('G4: after the kill of a master every failure is a 503, and every code works', async (t) => {
    const killed = await master()
    const bodies = await bodiesOn(killed, 24)
    await untilReplicated(killed, 2)
    await signUpDuring(t, app, bodies, async (untilFailure) => {
      await killed.kill()
      await untilFailure()
      await failOver()
    })
  })

  await t.test('G4: the service leaves a master that becomes a replica', async (t) => {
    const former = await master()
    const bodies = await bodiesOn(former, 24)
    await untilReplicated(former, 1)
    await signUpDuring(t, app, bodies, failOver)
  })
})

t.test('Redis behind one address, whose master changes', async (t) => {
  /** Lets a server load its data again, for longer than a test takes. */
  async function load({ admin }: RedisServer): Promise<void> {
    await admin.mset(Object.fromEntries(Array.from({ length: 2_000 }, (_, n) => [`key:${n}`, 'x'.repeat(1_000)])))
    await admin.config('SET', 'key-load-delay', 100_000)
    const loading = admin.duplicate()
    loading.on('error', () => undefined)
    loading.call('DEBUG', 'RELOAD').catch(() => loading.disconnect())
    await until('the server loads', async () => (await admin.info('persistence')).includes('loading:1'))
  }
  const next = await startRedis(t)
  const changes: Record<string, (former: RedisServer, address: FaultProxy) => Promise<unknown>> = {
    READONLY: ({ admin }) => admin.replicaof('127.0.0.1', next.port),
    LOADING: load,
    'LOADING when it connects': async (former, address) => {
      await load(former)
      await address.apply('reset')
      await until('the service meets the server that loads', () => address.connectionCount >= 3)
    }
  }
  t.jobs = Object.keys(changes).length
  for (const [answer, change] of Object.entries(changes)) {
    t.test(`${answer}: the connection is dropped, and the next one finds the new master`, async (t) => {
      // While it loads, Redis answers its clients after every 1,024 bytes that it reads. Compressed, those would be many keys.
      const loading = ['loading-process-events-interval-bytes 1024', 'rdbcompression no']
      const former = await startRedis(t, ['enable-debug-command yes', ...loading])
      const address = await FaultProxy.open(former.url)
      t.teardown(() => address.close())
      const app = await build(t, { REDIS_URL: address.url })
      await change(former, address)
      t.strictSame(statusAndErrno(await client(app).sendCode(newMobile())), [503, '4001'])
      await until('only Redis fails', async () => {
        return `${(await app.inject('/health/ready')).json().data.failing}` === 'Redis'
      })
      address.retarget(next.url)
      const [body] = await bodiesOn(next, 1)
      t.equal((await retried(() => client(app).signUp(body))).statusCode, 201)
    })
  }
})

async function startReplicated(t: Test, mode: 'synchronous' | 'asynchronous') {
  const postgres = await ReplicatedPostgres.start(mode)
  t.teardown(() => postgres.stop())
  const api = client(await build(t, { ...impatient, DATABASE_URL: postgres.address.url }))
  return {
    postgres,
    api,
    /** Signs up with retries. @returns the id in the answer */
    async idOf(body: SignUpBody): Promise<string> {
      const reply = await retried(() => api.signUp(body))
      t.equal(reply.statusCode, 201, reply.body)
      return reply.json().data.user_id
    },
    /** @returns the id of the row of each mobile */
    async idsOfRows(): Promise<Map<string, string>> {
      const rows = await postgres.query<{ id: string; mobile: string }>('SELECT id, mobile FROM users ORDER BY mobile')
      return new Map(rows.map(({ id, mobile }) => [mobile, id]))
    }
  }
}

t.test('G2, G3: with synchronous replication a failover of Postgres loses no answered sign-up', async (t) => {
  const { postgres, idOf, idsOfRows } = await startReplicated(t, 'synchronous')
  const ids = new Map<string, string>()
  let isOver = false
  t.teardown(() => {
    isOver = true
  })
  const clients = Array.from({ length: 8 }, async () => {
    while (!isOver) {
      const body = await signUpBody()
      ids.set(body.mobile, await idOf(body))
    }
  })
  await until('people sign up', () => ids.size >= 20)
  await postgres.failOver()
  const answered = ids.size
  await until('people sign up again, without a restart', () => ids.size >= answered + 20)
  isOver = true
  await Promise.all(clients)
  t.strictSame(await idsOfRows(), new Map([...ids].sort()))
})

t.test('G2: what asynchronous replication loses can be done again, and no id is given twice', async (t) => {
  const { postgres, api, idOf, idsOfRows } = await startReplicated(t, 'asynchronous')
  const signUpAll = async (bodies: SignUpBody[]) => {
    const ids: string[] = []
    for (const body of bodies) ids.push(await idOf(body))
    return ids
  }
  const newBodies = (count: number) => Promise.all(Array.from({ length: count }, () => signUpBody()))
  const kept = await newBodies(2)
  const keptIds = await signUpAll(kept)
  await postgres.untilReplicated()
  await postgres.stopReplicating()
  // More than the 32 values that Postgres logs ahead.
  const lost = await newBodies(50)
  const lostIds = await signUpAll(lost)
  const cookie = cookieOf(await retried(() => api.signUp(lost[0])))
  await postgres.failOver()
  const newIds = await signUpAll(await newBodies(50))
  t.equal((await idsOfRows()).size, kept.length + newIds.length, 'the rows are lost')

  const repeatedIds = await signUpAll(lost)
  const allIds = [...keptIds, ...lostIds, ...newIds, ...repeatedIds]
  t.equal(new Set(allIds).size, allIds.length, 'no id is given twice')
  const rows = await idsOfRows()
  t.strictSame(
    [...lost, ...kept].map(({ mobile }) => rows.get(mobile)),
    [...repeatedIds, ...keptIds]
  )
  t.equal((await retried(() => api.whoAmI(cookie))).statusCode, 401, 'the session of the lost user has ended')
})

t.test('PG_POOLER=transaction: PgBouncer gets no startup parameter that it refuses', async (t) => {
  const DATABASE_URL = await startPooler(t, stores.databaseUrl)
  const app = await build(t, { DATABASE_URL, PG_POOLER: 'transaction', STORE_TIMEOUT_MS: `${poolerTimeoutMs}` })
  // More than its connections to Postgres, on which a named statement would exist already.
  const bodies = await Promise.all(Array.from({ length: 10 }, () => signUpBody()))
  const replies = await Promise.all(bodies.map((body) => client(app).signUp(body)))
  for (const { statusCode } of replies) t.equal(statusCode, 201)
})
