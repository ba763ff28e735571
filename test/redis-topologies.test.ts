import { setTimeout as sleep } from 'node:timers/promises'
import type { FastifyInstance } from 'fastify'
import { Cluster, type Redis } from 'ioredis'
import t, { type Test } from 'tap'
import { client, statusAndErrno } from '../testkit/client.js'
import { FaultProxy } from '../testkit/fault-proxy.js'
import {
  masterName,
  password,
  type RedisServer,
  serviceCredentials,
  startCluster,
  startRedis,
  startSentinels
} from '../testkit/redis-topologies.js'
import { refusedObjects } from '../testkit/rights.js'
import { type SignUpBody, startTestbed } from '../testkit/testbed.js'
import { retried, until } from '../testkit/until.js'

const { build, newMobile, signUpBody, cookieOf, userRows } = await startTestbed(t)

// Cluster, Sentinel and one address at the same time.
t.jobs = 3

const unlimited = { SMS_IP_HOURLY_MAX: '0', SMS_PREFIX_HOURLY_MAX: '0' }
/** For requests that meet a dead server. It bounds the lease of a lost claim, too. */
const impatient = { ...unlimited, STORE_TIMEOUT_MS: '1000', HASH_MAX_WAIT_MS: '500' }

const addressesOf = (servers: readonly RedisServer[]) => servers.map(({ port }) => `127.0.0.1:${port}`)

const storeCode = (redis: Redis | Cluster, { mobile, sms_code }: SignUpBody) =>
  redis.set(`sms_code_${mobile}`, sms_code, 'EX', 300)

/** Returns the body of a sign-up whose code is in this Redis. */
async function bodyIn(redis: Redis | Cluster, mobile = newMobile()): Promise<SignUpBody> {
  const body = await signUpBody({ mobile })
  await storeCode(redis, body)
  return body
}

/** Checks the main promises of the contract, and that the servers refuse the service nothing. */
async function checkContract(t: Test, app: FastifyInstance, redis: Redis | Cluster, servers: readonly RedisServer[]) {
  const api = client(app)
  const mobile = newMobile()
  t.strictSame(statusAndErrno(await api.sendCode(mobile)), [202, '0'])
  const limited = await api.sendCode(mobile)
  t.strictSame(statusAndErrno(limited), [429, '4201'])
  t.match(`${limited.headers['retry-after']}`, /^(60|[45]\d)$/)
  t.equal(await redis.zcard(`sms_codes:mobile:${mobile}`), 1, 'an exhausted limit leaves the others unchanged')

  const body = { ...(await signUpBody({ mobile })), sms_code: await redis.get(`sms_code_${mobile}`) }
  t.strictSame(statusAndErrno(await api.signUp({ ...(await bodyIn(redis)), sms_code: 'wrong' })), [422, '4004'])
  const signedUp = await api.signUp(body)
  t.strictSame(statusAndErrno(signedUp), [201, '0'])
  const replayed = await api.signUp(body)
  t.equal(replayed.headers['idempotent-replayed'], 'true')
  t.equal(replayed.json().data.user_id, signedUp.json().data.user_id)
  t.strictSame(statusAndErrno(await api.signUp(await bodyIn(redis, mobile))), [409, '4003'])

  const login = { mobile, password: body.password }
  t.strictSame(statusAndErrno(await api.logIn({ ...login, password: 'wrong' })), [401, '4102'])
  const loggedIn = await api.logIn(login)
  t.strictSame(statusAndErrno(loggedIn), [201, '0'])
  const cookies = [signedUp, replayed, loggedIn].map(cookieOf)
  for (const cookie of cookies) t.equal((await api.whoAmI(cookie)).statusCode, 200)
  await api.logOut(`${cookies[0]}`, '?everywhere=true')
  for (const cookie of cookies) t.equal((await api.whoAmI(cookie)).statusCode, 401)

  const oldCookie = cookieOf(await api.logIn(login))
  const reset = await api.resetPassword(await bodyIn(redis, mobile))
  t.strictSame(statusAndErrno(reset), [200, '0'])
  t.equal((await api.whoAmI(oldCookie)).statusCode, 401)
  t.equal((await api.whoAmI(cookieOf(reset))).statusCode, 200)

  const bodies = await Promise.all(Array.from({ length: 50 }, () => bodyIn(redis)))
  const signUps = await Promise.all(bodies.map((body) => retried(() => api.signUp(body))))
  t.ok(signUps.every(({ statusCode }) => statusCode === 201))
  const sameMobile = newMobile()
  const sends = await Promise.all(Array.from({ length: 50 }, () => api.sendCode(sameMobile)))
  t.equal(sends.filter(({ statusCode }) => statusCode === 202).length, 1, 'parallel requests do not exceed a limit')

  for (const { admin } of servers) t.strictSame(await refusedObjects(admin), [], 'the documented rights suffice')
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
  const failures: [number, string][] = []
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
        failures.push(statusAndErrno(reply))
        // The pause of a client before its retry.
        await sleep(50)
        return reply.statusCode !== 503
      })
    }
  }
  await Promise.all(Array.from({ length: 8 }, signUpInTurn))
  const unexpected = failures.filter(([status, errno]) => status !== 503 || !['4001', '4500'].includes(errno))
  t.strictSame(unexpected, [], 'every failure is a 503')
  for (const { mobile } of bodies) t.equal((await userRows(mobile)).length, 1)
}

t.test('Redis Cluster', async (t) => {
  const { servers, failOver } = await startCluster(t)
  const REDIS_URL = `redis://${serviceCredentials}${addressesOf(servers).join()}`
  const app = await build(t, { ...unlimited, REDIS_URL })
  const [master, otherMaster] = servers
  if (master === undefined || otherMaster === undefined) throw new Error('no masters')

  await t.test('the contract holds', async (t) => {
    const nodes = servers.map(({ port }) => ({ host: '127.0.0.1', port }))
    // Without refreshes: one that is in flight at the disconnect would start the next one for ever (ioredis 6.0.0).
    const redis = new Cluster(nodes, { redisOptions: { password }, slotsRefreshInterval: 0 })
    t.teardown(() => redis.disconnect())
    await checkContract(t, app, redis, servers)
  })

  await t.test(
    'the limits on wrong codes over all mobiles are on another node, and count in the same way',
    async (t) => {
      const wideForMobile = { SMS_CODE_ATTEMPTS: '1000', SMS_GUESS_DAILY_MAX: '0' }
      const limited = await build(t, { ...unlimited, ...wideForMobile, REDIS_URL, SMS_GUESS_IP_HOURLY_MAX: '5' })
      const { signUp } = client(limited)
      const { mobileSignup } = limited
      const from = '198.51.100.5'
      const statusOf = async (body: object) => (await signUp(body, { from })).statusCode
      const count = async () => {
        // No request waits for a refund.
        await mobileSignup.inFlight.drain()
        return mobileSignup.redis.run((redis) => redis.zcard(`{sms_guesses}:network:${from}`))
      }
      const [spare, ...bodies] = await bodiesOn(master, 8)
      if (spare === undefined) throw new Error('no body')
      const wrong = { ...spare, sms_code: '000000' }
      for (const body of bodies.slice(0, 3)) {
        t.equal(await statusOf(wrong), 422)
        t.equal(await statusOf(body), 201)
      }
      t.equal(await count(), 0, 'each code that is used gives a unit back')
      const [repeated] = bodies
      t.equal(await statusOf({ ...spare, sms_code: 'no code' }), 422)
      t.equal(await count(), 1)
      t.equal(await statusOf({ ...repeated }), 201)
      t.equal(await count(), 1, 'a repeat of a used one gives nothing back')
      t.equal(await statusOf({ ...repeated, sms_code: '1' }), 422)
      t.equal(await count(), 1, 'what cannot be a code costs nothing')
      for (const { statusCode } of await Promise.all(Array.from({ length: 20 }, () => signUp(wrong, { from })))) {
        t.ok([422, 429].includes(statusCode))
      }
      t.equal(await count(), 5)
      t.equal(await statusOf(spare), 429, 'also the right code')
      t.equal(await statusOf(wrong), 429)
      t.equal((await signUp(spare, { from: '198.51.100.6' })).statusCode, 201)
    }
  )

  await t.test('scripts are sent again after the nodes have lost them', async (t) => {
    for (const { admin } of servers) await admin.script('FLUSH')
    for (const body of await bodiesOn(master, 1)) t.equal((await client(app).signUp(body)).statusCode, 201)
  })

  await t.test('a start waits for a master that hangs', async (t) => {
    // Longer than STORE_TIMEOUT_MS: the first command for this master times out before it has a connection.
    await otherMaster.admin.client('PAUSE', 3_000, 'ALL')
    const startedApp = await build(t, { ...impatient, REDIS_URL })
    t.equal((await startedApp.inject('/health/ready')).statusCode, 200)
  })

  await t.test('a code whose slot is moving is a 503, and works after the move', async (t) => {
    const bodies = await bodiesOn(master, 3)
    const [masterId, otherId] = await Promise.all([master, otherMaster].map(({ admin }) => admin.cluster('MYID')))
    const slotOf = async (mobile: string) => Number(await master.admin.cluster('KEYSLOT', `sms_code_${mobile}`))
    for (const { mobile } of bodies) {
      const slot = await slotOf(mobile)
      await otherMaster.admin.cluster('SETSLOT', slot, 'IMPORTING', `${masterId}`)
      await master.admin.cluster('SETSLOT', slot, 'MIGRATING', `${otherId}`)
      const keys = await master.admin.cluster('GETKEYSINSLOT', slot, 100)
      const options = ['', 0, 5_000, 'AUTH', password, 'KEYS', ...keys]
      await master.admin.call('MIGRATE', '127.0.0.1', otherMaster.port, ...options)
    }
    // Redis runs no script on two keys of a moving slot if one of them does not exist.
    const repliesDuring = await Promise.all(bodies.map((body) => client(app).signUp(body)))
    for (const reply of repliesDuring) t.strictSame(statusAndErrno(reply), [503, '4001'], 'during the move')
    for (const { mobile } of bodies) {
      const slot = await slotOf(mobile)
      for (const { admin } of [otherMaster, master]) await admin.cluster('SETSLOT', slot, 'NODE', `${otherId}`)
    }
    for (const body of bodies) t.equal((await client(app).signUp(body)).statusCode, 201, 'after the move')
  })

  await t.test('after the kill of a master every failure is a 503, and every code works', async (t) => {
    const impatientApp = await build(t, { ...impatient, REDIS_URL })
    const bodies = shuffled([...(await bodiesOn(master, 40)), ...(await bodiesOn(otherMaster, 20))])
    await untilReplicated(master, 1)
    await signUpDuring(t, impatientApp, bodies, async (untilFailure) => {
      await master.kill()
      await untilFailure()
      await failOver()
    })
  })

  /** Returns bodies whose codes are on one master. */
  async function bodiesOn({ admin }: RedisServer, count: number): Promise<SignUpBody[]> {
    const bodies: SignUpBody[] = []
    while (bodies.length < count) {
      const body = await signUpBody()
      // Other masters refuse the key.
      const isStored = await storeCode(admin, body).then(
        () => true,
        () => false
      )
      if (isStored) bodies.push(body)
    }
    return bodies
  }
})

t.test('Redis Sentinel', async (t) => {
  const { servers, sentinels, master, failOver } = await startSentinels(t)
  const REDIS_URL = `redis+sentinel://${serviceCredentials}${addressesOf(sentinels).join()}/${masterName}/0`
  const app = await build(t, { ...unlimited, REDIS_URL })
  const impatientApp = await build(t, { ...impatient, REDIS_URL })

  await t.test('the contract holds', async (t) => checkContract(t, app, (await master()).admin, servers))

  await t.test('after the kill of a master every failure is a 503, and every code works', async (t) => {
    const killed = await master()
    const bodies = await bodiesOn(killed, 40)
    await untilReplicated(killed, 2)
    await signUpDuring(t, impatientApp, bodies, async (untilFailure) => {
      await killed.kill()
      await untilFailure()
      await failOver()
    })
  })

  await t.test('the service leaves a master that becomes a replica', async (t) => {
    const formerMaster = await master()
    const bodies = await bodiesOn(formerMaster, 40)
    await untilReplicated(formerMaster, 1)
    await signUpDuring(t, impatientApp, bodies, failOver)
  })

  async function bodiesOn({ admin }: RedisServer, count: number): Promise<SignUpBody[]> {
    const bodies = await Promise.all(Array.from({ length: count }, () => signUpBody()))
    await Promise.all(bodies.map((body) => storeCode(admin, body)))
    return bodies
  }
})

t.test('Redis behind one address, whose master changes', async (t) => {
  const urlOf = ({ port }: RedisServer) => `redis://${serviceCredentials}127.0.0.1:${port}`
  async function startMasters() {
    const lines = ['enable-debug-command yes', 'loading-process-events-interval-bytes 1024']
    const [former, next] = [await startRedis(t, lines), await startRedis(t)]
    const address = await FaultProxy.open(urlOf(former))
    t.teardown(() => address.close())
    return { former, next, address }
  }

  for (const answer of ['READONLY', 'LOADING'] as const) {
    await t.test(`${answer}: the connection is dropped, and the next one finds the new master`, async (t) => {
      const { former, next, address } = await startMasters()
      const app = await build(t, { ...unlimited, REDIS_URL: address.url })
      t.equal((await client(app).signUp(await bodyIn(former.admin))).statusCode, 201)

      if (answer === 'READONLY') await former.admin.replicaof('127.0.0.1', next.port)
      else await load(former)
      t.strictSame(statusAndErrno(await client(app).sendCode(newMobile())), [503, '4001'])
      await until(
        'only Redis fails',
        async () => `${(await app.inject('/health/ready')).json().data.failing}` === 'Redis'
      )

      address.retarget(urlOf(next))
      const body = await bodyIn(next.admin)
      t.equal((await retried(() => client(app).signUp(body))).statusCode, 201)
    })
  }

  await t.test('a server that loads is left, also if it does so when the service connects', async (t) => {
    const { former, next, address } = await startMasters()
    const app = await build(t, { ...unlimited, REDIS_URL: address.url })
    await load(former)
    await address.apply('reset')
    await until('the service meets the server that loads', () => address.connectionCount >= 3)
    address.retarget(urlOf(next))
    const body = await bodyIn(next.admin)
    t.equal((await retried(() => client(app).signUp(body))).statusCode, 201)
  })

  await t.test('a start fails if Redis is too old', async (t) => {
    const { former, address } = await startMasters()
    const [, version = ''] = /redis_version:(\S+)/.exec(await former.admin.info('server')) ?? []
    const old = `5${version.slice(1)}`
    address.strike('\r\nserver\r\n', { kind: 'replace', from: `version:${version}`, to: `version:${old}` })
    await t.rejects(build(t, { ...unlimited, REDIS_URL: address.url }), {
      message: `Redis is too old: version ${old}, expected 6.2 or later`
    })
  })
})

/** Lets a server load its data again, for longer than a test takes. */
async function load({ admin }: RedisServer): Promise<void> {
  await admin.mset(Object.fromEntries(Array.from({ length: 2_000 }, (_, index) => [`key:${index}`, 'x'.repeat(1_000)])))
  await admin.config('SET', 'key-load-delay', 100_000)
  const loading = admin.duplicate()
  loading.on('error', () => undefined)
  loading.call('DEBUG', 'RELOAD').catch(() => loading.disconnect())
  await until('the server loads', async () => (await admin.info('persistence')).includes('loading:1'))
}

/** Waits until so many replicas have the codes that were stored on the connection of their master. */
const untilReplicated = ({ admin }: RedisServer, replicaCount: number) =>
  until(`${replicaCount} replicas have the codes`, async () => (await admin.wait(replicaCount, 1_000)) >= replicaCount)

function shuffled<T>(list: T[]): T[] {
  return list
    .map((item) => ({ item, order: Math.random() }))
    .sort((one, other) => one.order - other.order)
    .map(({ item }) => item)
}
