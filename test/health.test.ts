import t, { type Test } from 'tap'
import type { Environment } from '../dist/config/config.js'
import { startTestbed } from '../testkit/testbed.js'
import { until } from '../testkit/until.js'

const { build, log, openProxy, redis } = await startTestbed(t)

async function buildBehindProxies(t: Test, env: Environment = {}) {
  const [redisProxy, postgresProxy] = [await openProxy(t, 'REDIS_URL'), await openProxy(t, 'DATABASE_URL')]
  const urls = { REDIS_URL: redisProxy.url, DATABASE_URL: postgresProxy.url }
  return { app: await build(t, { ...urls, STORE_TIMEOUT_MS: '1000', ...env }), redisProxy, postgresProxy }
}

t.test('ready names the store that fails, and succeeds when it is back; live always succeeds', async (t) => {
  const { app, redisProxy, postgresProxy } = await buildBehindProxies(t)
  const ready = async () => {
    const reply = await app.inject('/health/ready')
    return [reply.statusCode, reply.json()]
  }
  t.strictSame(await ready(), [200, { errno: '0', errmsg: '成功' }])
  for (const [proxy, name] of [
    [redisProxy, 'Redis'],
    [postgresProxy, 'Postgres']
  ] as const) {
    for (const fault of ['refuse', 'stall'] as const) {
      await proxy.apply(fault)
      await until('ready fails', async () => (await ready())[0] === 503)
      t.strictSame(await ready(), [503, { errno: '4001', errmsg: '数据库异常', data: { failing: [name] } }], fault)
      t.equal((await app.inject('/health/live')).statusCode, 200)
      await proxy.heal()
      await until('ready succeeds', async () => (await ready())[0] === 200)
    }
  }
})

t.test('probes ask the stores at most once a second, and are not logged', async (t) => {
  const app = await build(t)
  const before = { log: log().length, pings: await countPings() }
  const startedAt = performance.now()
  const probes = Array.from({ length: 200 }, () => [app.inject('/health/ready'), app.inject('/health/live')])
  await Promise.all(probes.flat())
  const pings = (await countPings()) - before.pings
  // A busy machine may take seconds for the probes.
  t.ok(pings >= 1 && pings <= 1 + Math.floor((performance.now() - startedAt) / 1_000), `${pings} pings`)
  t.equal(log().length, before.log)

  await until('a later probe asks the stores again', async () => {
    await app.inject('/health/ready')
    return (await countPings()) > before.pings + pings
  })

  async function countPings(): Promise<number> {
    return Number(/cmdstat_ping:calls=(\d+)/.exec(await redis.info('commandstats'))?.[1] ?? 0)
  }
})

t.test('a probe keeps its status under LEGACY_STATUS', async (t) => {
  const { app, postgresProxy } = await buildBehindProxies(t, { LEGACY_STATUS: 'true' })
  await postgresProxy.apply('refuse')
  await until('ready fails', async () => (await app.inject('/health/ready')).statusCode === 503)
  t.equal((await app.inject('/health/ready')).json().errno, '4001')
  t.equal((await app.inject('/health/nowhere')).statusCode, 200)
})

t.test('an announced shutdown makes ready fail at once, while requests are still served', async (t) => {
  const app = await build(t)
  app.shutdown.announce()
  const reply = await app.inject('/health/ready')
  t.strictSame(
    [reply.statusCode, reply.json()],
    [503, { errno: '4500', errmsg: '服务繁忙，请稍后重试', data: { failing: ['shutting down'] } }]
  )
  t.equal((await app.inject('/health/live')).statusCode, 200)
  t.equal((await app.inject('/api/v1.0/session')).statusCode, 401)
})
