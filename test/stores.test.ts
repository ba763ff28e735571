import type { FastifyInstance } from 'fastify'
import t from 'tap'
import { client, statusAndErrno } from '../testkit/client.js'
import { startTestbed } from '../testkit/testbed.js'
import { retried, until } from '../testkit/until.js'

/*
 * While a store fails, requests are refused at once. When it is back, it is used again.
 */

const { build, openProxy, postgres, redis, signUpBody } = await startTestbed(t)

const storeTimeoutMs = 1_000

/** The promise is 2 s: the longest pause between two attempts to connect is 1 s. The rest is for a busy machine. */
const recoveryMaxMs = 20_000

const reconnectPauseMaxMs = 1_000

/** Whether requests are refused without a round trip to the store. */
const isKnownToFail = {
  REDIS_URL: (app: FastifyInstance) => app.withRedis(async ({ status }) => status !== 'ready'),
  DATABASE_URL: async ({ postgres }: FastifyInstance) => {
    try {
      postgres.assertAvailable()
      return false
    } catch {
      return true
    }
  }
}

for (const store of ['REDIS_URL', 'DATABASE_URL'] as const) {
  for (const fault of ['stall', 'refuse'] as const) {
    t.test(`${store}, ${fault}: requests get 503 4001 at once, and the store is used again afterwards`, async (t) => {
      const proxy = await openProxy(t, store)
      const app = await build(t, { [store]: proxy.url, STORE_TIMEOUT_MS: `${storeTimeoutMs}` })
      const { signUp } = client(app)
      const reconnectPausesMs: number[] = []
      await app.withRedis(async (redis) => redis.on('reconnecting', (pauseMs) => reconnectPausesMs.push(pauseMs)))
      t.equal((await signUp(await signUpBody())).statusCode, 201)

      await proxy.apply(fault)
      const body = await signUpBody()
      t.strictSame(statusAndErrno(await signUp(body)), [503, '4001'])
      // For Postgres it takes another timeout: the first may have been a statement that waited for a lock.
      await until('the store is known to fail', () => isKnownToFail[store](app))
      const startedAt = Date.now()
      for (let index = 0; index < 10; index++) {
        t.strictSame(statusAndErrno(await signUp(await signUpBody())), [503, '4001'])
      }
      t.ok(Date.now() - startedAt < 5 * storeTimeoutMs, 'ten refusals do not take ten timeouts')

      await proxy.heal()
      const healedAt = Date.now()
      t.equal((await retried(() => signUp(body))).statusCode, 201)
      t.ok(Date.now() - healedAt < recoveryMaxMs)
      t.ok(
        reconnectPausesMs.every((pauseMs) => pauseMs <= reconnectPauseMaxMs),
        `pauses: ${reconnectPausesMs}`
      )
      t.equal(reconnectPausesMs.length > 0, store === 'REDIS_URL')
    })
  }
}

t.test('a statement that waits for a lock does not make other requests fail', async (t) => {
  const { signUp } = client(await build(t, { STORE_TIMEOUT_MS: `${storeTimeoutMs}` }))
  const [blocked, free] = [await signUpBody(), await signUpBody()]
  const connection = await postgres.connect()
  await connection.query('BEGIN')
  await connection.query(`INSERT INTO users (name, mobile, password_hash) VALUES ('', $1, '')`, [blocked.mobile])
  t.strictSame(statusAndErrno(await signUp(blocked)), [503, '4001'])
  t.equal((await signUp(free)).statusCode, 201)
  await connection.query('ROLLBACK')
  connection.release()
  t.equal((await signUp(blocked)).statusCode, 201)
})

t.test('while Redis is away no command is queued, and afterwards none is sent again', async (t) => {
  const proxy = await openProxy(t, 'REDIS_URL')
  const { signUp } = client(await build(t, { REDIS_URL: proxy.url, STORE_TIMEOUT_MS: '30000' }))
  const body = await signUpBody()
  const wrong = { ...(await signUpBody()), sms_code: 'wrong' }
  proxy.strike(`sms_code_${body.mobile}`, { kind: 'refuse' })
  t.strictSame(statusAndErrno(await signUp(body)), [503, '4001'])
  await redis.config('RESETSTAT')
  const replies = await Promise.all(Array.from({ length: 10 }, () => signUp(wrong)))
  for (const reply of replies) t.strictSame(statusAndErrno(reply), [503, '4001'])

  await proxy.heal()
  t.equal((await retried(() => signUp(wrong))).statusCode, 422)
  t.equal(await redis.exists(`sms_code_${body.mobile}`), 1, 'the interrupted claim has not run')
  const commandStats = await redis.info('commandstats')
  const [, scripts] = /cmdstat_eval:calls=(\d+)/.exec(commandStats) ?? []
  t.equal(scripts, '1', 'only the last claim has reached Redis')
  t.notMatch(commandStats, /cmdstat_evalsha:/)
})

t.test(
  'a Redis connection on which a command has timed out is dropped, also if others were answered on it',
  async (t) => {
    const [timeoutMs, earlierReplyMs] = [2_500, 500]
    const proxy = await openProxy(t, 'REDIS_URL')
    const app = await build(t, {
      REDIS_URL: proxy.url,
      STORE_TIMEOUT_MS: `${timeoutMs}`,
      // With tracing there is no automatic pipelining, so one command is sent while another waits for its reply.
      OTEL_EXPORTER_OTLP_ENDPOINT: 'http://127.0.0.1:1'
    })
    const { signUp } = client(app)
    const body = await signUpBody()
    // The earlier reply arrives while the claim waits for its own, which comes after the timeout.
    const earlierStruck = proxy.strike('an earlier key', { kind: 'delay', ms: earlierReplyMs })
    const claimStruck = proxy.strike(`sms_code_${body.mobile}`, { kind: 'delay', ms: timeoutMs + 100 })
    const { connectionCount } = proxy
    const earlier = app.withRedis((redis) => redis.get('an earlier key'))
    await earlierStruck
    const reply = signUp(body)
    await claimStruck
    t.equal(await earlier, null)
    t.strictSame(statusAndErrno(await reply), [503, '4001'])
    await until('there is a new connection', () => proxy.connectionCount > connectionCount)
    t.equal((await retried(async () => signUp(await signUpBody()))).statusCode, 201)
  }
)
