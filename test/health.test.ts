import { setTimeout as sleep } from 'node:timers/promises'
import t, { type Test } from 'tap'
import { FaultProxy } from './fault-proxy.js'
import { build, logLines, redis, stores, until } from './helper.js'

async function buildBehindProxies(t: Test, env = {}) {
  const [redisProxy, postgresProxy] = [
    await FaultProxy.open(stores.redisUrl),
    await FaultProxy.open(stores.databaseUrl)
  ]
  t.teardown(() => Promise.all([redisProxy.close(), postgresProxy.close()]))
  const app = await build(t, {
    REDIS_URL: redisProxy.url,
    DATABASE_URL: postgresProxy.url,
    STORE_TIMEOUT_MS: '500',
    ...env
  })
  return { app, redisProxy, postgresProxy }
}

t.test('ready says which store fails, and is true again when it is back; live is true all the time', async (t) => {
  const { app, redisProxy, postgresProxy } = await buildBehindProxies(t)
  const ready = async () => {
    const { statusCode, body } = await app.inject('/health/ready')
    return [statusCode, JSON.parse(body)]
  }
  const fine = [200, { errno: '0', errmsg: '成功' }]
  t.strictSame(await ready(), fine)
  for (const [proxy, name] of [
    [redisProxy, 'Redis'],
    [postgresProxy, 'Postgres']
  ] as const) {
    for (const fault of ['refuse', 'stall'] as const) {
      await proxy.apply(fault)
      await until(async () => (await ready())[0] === 503)
      t.strictSame(await ready(), [503, { errno: '4001', errmsg: '数据库异常', data: { failing: [name] } }], fault)
      t.equal((await app.inject('/health/live')).statusCode, 200)
      await proxy.heal()
      await until(async () => (await ready())[0] === 200)
    }
  }
})

t.test('probes ask the stores at most once a second, and leave no line in the log', async (t) => {
  const app = await build(t)
  await app.inject('/health/ready')
  await sleep(1_100)
  const before = { log: logLines().length, redis: await pings() }
  await Promise.all(Array.from({ length: 200 }, () => app.inject('/health/ready')))
  await Promise.all(Array.from({ length: 200 }, () => app.inject('/health/live')))
  t.equal((await pings()) - before.redis, 1)
  t.equal(logLines().length, before.log)

  async function pings(): Promise<number> {
    return Number(/cmdstat_ping:calls=(\d+)/.exec(await redis.info('commandstats'))?.[1] ?? 0)
  }
})

t.test('a probe keeps its status under LEGACY_STATUS', async (t) => {
  const { app, postgresProxy } = await buildBehindProxies(t, { LEGACY_STATUS: 'true' })
  await postgresProxy.apply('refuse')
  await until(async () => (await app.inject('/health/ready')).statusCode === 503)
  t.equal((await app.inject('/health/ready')).json().errno, '4001')
  t.equal((await app.inject('/health/nowhere')).statusCode, 200)
})

t.test('a shutdown that is announced makes ready fail at once, while requests are still served', async (t) => {
  const app = await build(t)
  app.connections.announceClosing()
  const reply = await app.inject('/health/ready')
  t.strictSame(
    [reply.statusCode, reply.json()],
    [503, { errno: '4500', errmsg: '服务繁忙，请稍后重试', data: { failing: ['shutting down'] } }]
  )
  t.equal((await app.inject('/health/live')).statusCode, 200)
  t.equal((await app.inject('/api/v1.0/session')).statusCode, 401)
})
