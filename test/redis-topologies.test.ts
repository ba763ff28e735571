import { setTimeout as sleep } from 'node:timers/promises'
import type { FastifyInstance } from 'fastify'
import { Cluster, Redis } from 'ioredis'
import t, { type Test } from 'tap'
import { brief, build, cookieOf, newMobile, post, signUpBody, userRow, whoAmI } from './helper.js'
import { password, type RedisServer, startCluster, startSentinels } from './redis-servers.js'

const credentials = `:${encodeURIComponent(password)}@`
const quick = { STORE_TIMEOUT_MS: '500', HASH_MAX_WAIT_MS: '500', SMS_IP_HOURLY_MAX: '0', SMS_PREFIX_HOURLY_MAX: '0' }

const addresses = (servers: readonly RedisServer[]) => servers.map(({ port }) => `127.0.0.1:${port}`)

/** The body of a sign-up whose code is where the service looks for it. */
async function bodyWithCode(keys: Redis | Cluster, mobile = newMobile()) {
  const body = await signUpBody({ mobile })
  await keys.set(`sms_code_${mobile}`, body.sms_code, 'EX', 300)
  return body
}

const inject = (app: FastifyInstance, method: 'POST' | 'PUT' | 'DELETE', path: string, payload?: object, cookie = '') =>
  app.inject({ method, url: `/api/v1.0${path}`, headers: { cookie }, ...(payload && { payload }) })

/** The contract's main promises, one after the other. */
async function keepsTheContract(t: Test, app: FastifyInstance, keys: Redis | Cluster) {
  const mobile = newMobile()
  t.strictSame(brief(await inject(app, 'POST', '/sms_codes', { mobile })), [202, '0'])
  const limited = await inject(app, 'POST', '/sms_codes', { mobile })
  t.strictSame(brief(limited), [429, '4201'])
  t.match(limited.headers['retry-after'], /^(60|59)$/)
  t.equal(await keys.get(`sms_codes:mobile:${mobile}`), '1', 'a limit that is reached leaves the others as they were')

  const code = await keys.get(`sms_code_${mobile}`)
  const body = { ...(await signUpBody({ mobile })), sms_code: code }
  t.strictSame(brief(await post(app, { ...(await bodyWithCode(keys)), sms_code: 'wrong' })), [422, '4004'])
  const signedUp = await post(app, body)
  t.strictSame(brief(signedUp), [201, '0'])
  const replayed = await post(app, body)
  t.equal(replayed.headers['idempotent-replayed'], 'true')
  t.equal(replayed.json().data.user_id, signedUp.json().data.user_id)
  t.strictSame(brief(await post(app, await bodyWithCode(keys, mobile))), [409, '4003'])

  const login = { mobile, password: body.password }
  t.strictSame(brief(await inject(app, 'POST', '/sessions', { ...login, password: 'wrong' })), [401, '4102'])
  const loggedIn = await inject(app, 'POST', '/sessions', login)
  t.strictSame(brief(loggedIn), [201, '0'])
  const cookies = [signedUp, replayed, loggedIn].map(cookieOf)
  for (const cookie of cookies) t.equal(await whoAmI(app, cookie), 200)
  await inject(app, 'DELETE', '/session?everywhere=true', undefined, cookies[0])
  for (const cookie of cookies) t.equal(await whoAmI(app, cookie), 401)

  const again = cookieOf(await inject(app, 'POST', '/sessions', login))
  const reset = await inject(app, 'PUT', '/users/password', await bodyWithCode(keys, mobile))
  t.strictSame(brief(reset), [200, '0'])
  t.equal(await whoAmI(app, again), 401)
  t.equal(await whoAmI(app, cookieOf(reset)), 200)

  const many = await Promise.all(Array.from({ length: 50 }, () => bodyWithCode(keys)))
  const replies = await Promise.all(many.map((one) => post(app, one)))
  t.ok(replies.every(({ statusCode }) => statusCode === 201))
  const rival = newMobile()
  const sent = await Promise.all(Array.from({ length: 50 }, () => inject(app, 'POST', '/sms_codes', { mobile: rival })))
  t.equal(sent.filter(({ statusCode }) => statusCode === 202).length, 1, 'a limit is never given twice')
}

/** Signs up with retries on 503 while a fault strikes in the middle. */
async function survives(t: Test, app: FastifyInstance, bodies: { mobile: string }[], strike: () => Promise<unknown>) {
  const waiting = [...bodies]
  const refusals: (string | number)[][] = []
  let done = 0
  let struck: Promise<unknown> | undefined
  async function client() {
    for (let body = waiting.shift(); body !== undefined; body = waiting.shift()) {
      for (;;) {
        const reply = await post(app, body)
        if (reply.statusCode === 201) break
        refusals.push(brief(reply))
        if (reply.statusCode !== 503) break
        await sleep(50)
      }
      done++
      if (done >= bodies.length / 3) struck ??= strike()
    }
  }
  await Promise.all(Array.from({ length: 8 }, client))
  await struck
  const allowed = (refusal: (string | number)[]) => refusal[0] === 503 && ['4001', '4500'].includes(`${refusal[1]}`)
  t.strictSame(
    refusals.filter((refusal) => !allowed(refusal)),
    [],
    'every failure is a 503'
  )
  for (const { mobile } of bodies) t.equal((await userRow(mobile)).length, 1)
  return refusals.length
}

t.test('Redis Cluster of six nodes', async (t) => {
  const servers = await startCluster(t)
  const keys = new Cluster(servers.slice(0, 3), { redisOptions: { password } })
  t.teardown(() => keys.disconnect())
  const [first = '', ...others] = addresses(servers)
  const app = await build(t, { ...quick, REDIS_URL: `redis://${credentials}${first},${others.join()}` })

  await t.test('the contract holds', (t) => keepsTheContract(t, app, keys))

  await t.test('scripts that the nodes have forgotten are sent again', async (t) => {
    for (const { admin } of servers) await admin.script('FLUSH')
    t.equal((await post(app, await bodyWithCode(keys))).statusCode, 201)
  })

  await t.test('a slot that moves to another master is a 503, and its codes move along', async (t) => {
    const [from, to] = servers
    if (from === undefined || to === undefined) throw new Error('no servers')
    const bodies = await codesOn(from, 3)
    const ids = await Promise.all([from, to].map(({ admin }) => admin.cluster('MYID')))
    for (const { mobile } of bodies) {
      const slot = Number(await from.admin.cluster('KEYSLOT', `sms_code_${mobile}`))
      await to.admin.cluster('SETSLOT', slot, 'IMPORTING', `${ids[0]}`)
      await from.admin.cluster('SETSLOT', slot, 'MIGRATING', `${ids[1]}`)
      const moved = await from.admin.cluster('GETKEYSINSLOT', slot, 100)
      await from.admin.call('MIGRATE', '127.0.0.1', to.port, '', 0, 1_000, 'AUTH', password, 'KEYS', ...moved)
    }
    // Redis runs no script for two keys of which one is not there yet.
    for (const body of bodies) t.strictSame(brief(await post(app, body)), [503, '4001'], 'while it moves')
    for (const { mobile } of bodies) {
      const slot = Number(await from.admin.cluster('KEYSLOT', `sms_code_${mobile}`))
      for (const { admin } of [to, from]) await admin.cluster('SETSLOT', slot, 'NODE', `${ids[1]}`)
    }
    for (const body of bodies) t.equal((await post(app, body)).statusCode, 201, 'when it has moved')
  })

  await t.test('a master that is killed: every failure is a 503, and every code works', async (t) => {
    const [master, other] = servers
    if (master === undefined || other === undefined) throw new Error('no servers')
    const bodies = [...(await codesOn(master, 40)), ...(await codesOn(other, 20))]
    await master.admin.wait(1, 1_000)
    const refused = await survives(t, app, shuffled(bodies), () => master.kill())
    t.ok(refused > 0, 'the kill was felt')
  })

  /** Bodies whose codes are on one master. */
  async function codesOn({ admin }: RedisServer, count: number) {
    const bodies: Awaited<ReturnType<typeof bodyWithCode>>[] = []
    while (bodies.length < count) {
      const mobile = newMobile()
      const isHere = await admin.set(`sms_code_${mobile}`, '').then(
        () => true,
        () => false
      )
      if (isHere) bodies.push(await bodyWithCode(keys, mobile))
    }
    return bodies
  }
})

t.test('Redis Sentinel', async (t) => {
  const { servers, sentinels } = await startSentinels(t)
  const nodes = sentinels.map(({ port }) => ({ host: '127.0.0.1', port }))
  const keys = new Redis({ sentinels: nodes, name: 'sign-ups', password })
  keys.on('error', () => undefined)
  t.teardown(() => keys.disconnect())
  const REDIS_URL = `redis+sentinel://${credentials}${addresses(sentinels).join()}/sign-ups/0`
  const app = await build(t, { ...quick, REDIS_URL })

  await t.test('the contract holds', (t) => keepsTheContract(t, app, keys))

  await t.test('a master that is killed: every failure is a 503, and every code works', async (t) => {
    const bodies = await Promise.all(Array.from({ length: 40 }, () => bodyWithCode(keys)))
    const [master] = servers
    await keys.wait(2, 1_000)
    const refused = await survives(t, app, bodies, async () => master?.kill())
    t.ok(refused > 0, 'the kill was felt')
  })

  await t.test('a master that is made a replica is left', async (t) => {
    const bodies = await Promise.all(Array.from({ length: 40 }, () => bodyWithCode(keys)))
    await keys.wait(1, 1_000)
    await survives(t, app, bodies, async () => sentinels[0]?.admin.call('SENTINEL', 'FAILOVER', 'sign-ups'))
  })
})

function shuffled<T>(list: T[]): T[] {
  return list
    .map((item) => ({ item, place: Math.random() }))
    .sort((one, other) => one.place - other.place)
    .map(({ item }) => item)
}
