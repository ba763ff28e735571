import t, { type Test } from 'tap'
import type { Environment } from '#src/config/config.js'
import { client, statusAndErrno } from '../testkit/client.js'
import { startTestbed } from '../testkit/testbed.js'
import { retried, until } from '../testkit/until.js'

const { build, cookieOf, openProxy, postgres, redis, signUpBody } = await startTestbed(t)

async function buildBehindProxies(t: Test, env: Environment = {}) {
  const [redisProxy, postgresProxy] = [await openProxy(t, 'REDIS_URL'), await openProxy(t, 'DATABASE_URL')]
  const urls = { REDIS_URL: redisProxy.url, DATABASE_URL: postgresProxy.url }
  return { app: await build(t, { ...urls, STORE_TIMEOUT_MS: '1000', ...env }), redisProxy, postgresProxy }
}

t.test('a store that is away is named, and the instance stays ready: it answers 503 itself', async (t) => {
  const { app, redisProxy, postgresProxy } = await buildBehindProxies(t, { METRICS_PORT: '0' })
  const ready = async () => {
    const reply = await app.inject('/health/ready')
    t.strictSame([reply.statusCode, reply.json().errno], [200, '0'])
    return reply.json().data.failing
  }
  const availability = async () => {
    const scrape = await (await fetch(app.metricsUrl ?? '')).text()
    return ['postgres', 'redis'].map(
      (store) => scrape.match(`mobile_signup_store_available{store="${store}"} (.)`)?.[1]
    )
  }
  const { signUp, whoAmI } = client(app)
  await until('no store fails', async () => (await ready()).length === 0)
  await until('both are available', async () => `${await availability()}` === '1,1')
  const body = await signUpBody()
  const cookie = cookieOf(await retried(() => signUp(body)))
  for (const [proxy, name, expectedAvailability] of [
    [redisProxy, 'Redis', '1,0'],
    [postgresProxy, 'Postgres', '0,1']
  ] as const) {
    for (const fault of ['refuse', 'stall'] as const) {
      await proxy.apply(fault)
      await until(`only ${name} fails, ${fault}`, async () => `${await ready()}` === name)
      await until('it is not available', async () => `${await availability()}` === expectedAvailability)
      t.equal((await app.inject('/health/live')).statusCode, 200)
      const refused = await signUp(await signUpBody())
      t.strictSame([...statusAndErrno(refused), refused.headers['retry-after']], [503, '4001', '1'])
      if (name === 'Postgres') t.equal((await retried(() => whoAmI(cookie))).statusCode, 200, 'sessions go on')
      await proxy.heal()
      await until('no store fails', async () => (await ready()).length === 0)
    }
  }
})

t.test('a store that answers reads but cannot be written is named, too', async (t) => {
  const { app } = await buildBehindProxies(t)
  const failing = async () => (await app.inject('/health/ready')).json().data.failing
  const setReadOnly = (value: string) => postgres.query(`ALTER SYSTEM SET default_transaction_read_only = ${value}`)
  const reload = () => postgres.query('SELECT pg_reload_conf()')
  await redis.config('SET', 'maxmemory', '1')
  await until('Redis fails', async () => `${await failing()}` === 'Redis')
  await redis.config('SET', 'maxmemory', '0')
  await setReadOnly('on')
  await reload()
  await until('Postgres fails', async () => `${await failing()}` === 'Postgres')
  await setReadOnly('off')
  await reload()
  await until('no store fails', async () => `${await failing()}` === '')
})

t.test('before the start is complete, ready fails and requests are refused, while live succeeds', async (t) => {
  const app = await build(t)
  app.lifecycle.isStarted = false
  const reply = await app.inject('/health/ready')
  t.strictSame([reply.statusCode, reply.json().errno, reply.json().data], [503, '4500', { failing: ['starting'] }])
  t.equal((await app.inject('/health/live')).statusCode, 200)
  const refused = await client(app).signUp(await signUpBody())
  t.strictSame([...statusAndErrno(refused), refused.headers['retry-after']], [503, '4500', '1'])
  app.lifecycle.isStarted = true
  t.equal((await app.inject('/health/ready')).statusCode, 200)
})

t.test('probes ask the stores at most once a second, and are not logged', async (t) => {
  const lines: string[] = []
  const app = await build(t, {}, { logStream: { write: (line) => lines.push(line) } })
  const checksBefore = await countChecks()
  const startedAt = performance.now()
  const probes = Array.from({ length: 200 }, () => [app.inject('/health/ready'), app.inject('/health/live')])
  await Promise.all(probes.flat())
  const checks = (await countChecks()) - checksBefore
  // A busy machine may take seconds for the probes.
  t.ok(checks >= 1 && checks <= 1 + Math.floor((performance.now() - startedAt) / 1_000), `${checks} checks`)
  t.strictSame(lines, [])

  await until('a later probe asks the stores again', async () => {
    await app.inject('/health/ready')
    return (await countChecks()) > checksBefore + checks
  })

  async function countChecks(): Promise<number> {
    return Number(/cmdstat_set:calls=(\d+)/.exec(await redis.info('commandstats'))?.[1] ?? 0)
  }
})

t.test('ready is 503 while the table of the users is not there', async (t) => {
  const app = await build(t)
  const answer = async () => {
    const reply = await app.inject('/health/ready')
    return `${reply.statusCode} ${reply.json().data.failing}`
  }
  await postgres.query('ALTER TABLE users RENAME TO former_users')
  t.teardown(() => postgres.query('ALTER TABLE IF EXISTS former_users RENAME TO users'))
  await until('ready tells it', async () => (await answer()) === '503 no schema')
  t.equal((await app.inject('/health/live')).statusCode, 200)
  await postgres.query('ALTER TABLE former_users RENAME TO users')
  await until('ready is back', async () => (await answer()) === '200 ')
})

t.test('a probe keeps its status under LEGACY_STATUS', async (t) => {
  const app = await build(t, { LEGACY_STATUS: 'true' })
  t.equal((await app.inject('/health/nowhere')).statusCode, 200)
  app.lifecycle.announceShutdown()
  t.strictSame(statusAndErrno(await app.inject('/health/ready')), [503, '4500'])
})

t.test('an announced shutdown makes ready fail at once, while requests are still served', async (t) => {
  const app = await build(t)
  app.lifecycle.announceShutdown()
  const reply = await app.inject('/health/ready')
  t.strictSame(
    [reply.statusCode, reply.json()],
    [503, { errno: '4500', errmsg: '服务繁忙，请稍后重试', data: { failing: ['shutting down'] } }]
  )
  t.equal((await app.inject('/health/live')).statusCode, 200)
  t.equal((await app.inject('/api/v1.0/session')).statusCode, 401)
})
