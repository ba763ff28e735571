import { setTimeout as sleep } from 'node:timers/promises'
import t, { type Test } from 'tap'
import type { Environment } from '../src/config/config.js'
import { FaultProxy } from './fault-proxy.js'
import { build, post, postgres, redis, signUpBody, stores, until } from './helper.js'

/*
 * Section 6 of the design: a store that fails is answered at once, and used again when it is back.
 */

const storeTimeoutMs = 1_000

/** The service with a proxy in front of one of its stores. */
async function buildBehind(t: Test, store: 'REDIS_URL' | 'DATABASE_URL', env: Environment = {}) {
  const proxy = await FaultProxy.open(store === 'REDIS_URL' ? stores.redisUrl : stores.databaseUrl)
  t.teardown(() => proxy.close())
  return { proxy, app: await build(t, { [store]: proxy.url, STORE_TIMEOUT_MS: `${storeTimeoutMs}`, ...env }) }
}

for (const store of ['REDIS_URL', 'DATABASE_URL'] as const) {
  for (const fault of ['stall', 'refuse'] as const) {
    t.test(`${store}, ${fault}: 503 4001 at once after the first, and used again within 2 s`, async (t) => {
      const { app, proxy } = await buildBehind(t, store)
      t.equal((await post(app, await signUpBody())).statusCode, 201)
      await proxy.apply(fault)
      const body = await signUpBody()
      t.equal((await post(app, body)).statusCode, 503)
      // For Postgres it takes a second timeout to tell a store that is away from a statement that waits for a lock.
      await sleep(fault === 'stall' ? 1.5 * storeTimeoutMs : 100)

      const startedAt = Date.now()
      for (let n = 0; n < 10; n++) {
        const reply = await post(app, await signUpBody())
        t.strictSame([reply.statusCode, reply.json().errno], [503, '4001'])
      }
      t.ok(Date.now() - startedAt < storeTimeoutMs, 'ten of them in less than one timeout')

      await proxy.heal()
      const healedAt = Date.now()
      while ((await post(app, body)).statusCode === 503) await sleep(10)
      t.ok(Date.now() - healedAt < 2_000)
      t.equal((await post(app, body)).statusCode, 201)
    })
  }
}

t.test('a statement that waits for a lock does not make the others fail', async (t) => {
  const app = await build(t, { STORE_TIMEOUT_MS: '300' })
  const [blocked, free] = [await signUpBody(), await signUpBody()]
  const client = await postgres.connect()
  await client.query('BEGIN')
  await client.query(`INSERT INTO users (name, mobile, password_hash) VALUES ('', $1, '')`, [blocked.mobile])
  t.equal((await post(app, blocked)).statusCode, 503)
  t.equal((await post(app, free)).statusCode, 201)
  await client.query('ROLLBACK')
  client.release()
  t.equal((await post(app, blocked)).statusCode, 201)
})

t.test('while Redis is away nothing is queued, and nothing is sent again when it is back', async (t) => {
  const { app, proxy } = await buildBehind(t, 'REDIS_URL')
  const body = await signUpBody()
  proxy.strike(`sms_code_${body.mobile}`, { kind: 'reset' })
  t.equal((await post(app, body)).statusCode, 503)
  await redis.config('RESETSTAT')
  const wrong = { ...(await signUpBody()), sms_code: 'wrong' }
  const meanwhile = await Promise.all(Array.from({ length: 10 }, () => post(app, wrong)))
  t.ok(meanwhile.every(({ statusCode }) => statusCode === 503))
  while ((await post(app, wrong)).statusCode === 503) await sleep(10)
  t.equal(await redis.exists(`sms_code_${body.mobile}`), 1, 'the take that was cut off has not run')
  const [, evals = 0] = /cmdstat_eval:calls=(\d+)/.exec(await redis.info('commandstats')) ?? []
  t.equal(Number(evals), 1, 'of eleven takes and more the last alone has reached Redis')
})

t.test(
  'a Redis connection on which a command has timed out is dropped, whatever else was answered on it',
  async (t) => {
    // With traces there is no auto-pipelining, so one command is sent while another waits for its reply.
    const { app, proxy } = await buildBehind(t, 'REDIS_URL', { OTEL_EXPORTER_OTLP_ENDPOINT: 'http://127.0.0.1:1' })
    const body = await signUpBody()
    // The first reply arrives while the claim waits for its own, which comes after the timeout.
    const earlier = proxy.strike('an earlier key', { kind: 'delay', ms: 800 })
    const claim = proxy.strike(`sms_code_${body.mobile}`, { kind: 'delay', ms: storeTimeoutMs + 100 })
    const before = proxy.accepted
    const answer = app.onRedis((redis) => redis.get('an earlier key'))
    await earlier
    const reply = post(app, body)
    await claim
    t.equal(await answer, null)
    t.equal((await reply).statusCode, 503)
    await until(async () => proxy.accepted > before)
    await until(async () => (await post(app, await signUpBody())).statusCode === 201)
  }
)
