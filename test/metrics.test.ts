import { readFile } from 'node:fs/promises'
import type { FastifyInstance } from 'fastify'
import t from 'tap'
import { parse } from 'yaml'
import { outcomes } from '#src/outcomes.js'
import { client } from '../testkit/client.js'
import { answerWith, startWebhook } from '../testkit/sms-webhook.js'
import { startTestbed } from '../testkit/testbed.js'
import { until } from '../testkit/until.js'

const { stores, build, startService, openProxy, redis, signUpBody, newMobile, holdInserts } = await startTestbed(t)

async function scrape(app: FastifyInstance): Promise<string> {
  const reply = await fetch(app.metricsUrl ?? '')
  return reply.text()
}

/** Returns the value of a series, by its name and labels as they are scraped. */
function sampleOf(text: string, series: string): number | undefined {
  const line = text.split('\n').find((candidate) => candidate.startsWith(`${series} `))
  return line === undefined ? undefined : Number(line.slice(series.length + 1))
}

/** Returns the number of requests that were answered with an outcome. */
const requestCount = (text: string, method: string, route: string, outcome: string) =>
  sampleOf(
    text,
    `mobile_signup_request_duration_seconds_count{method="${method}",route="${route}",outcome="${outcome}"}`
  )

const signUpCount = (text: string, outcome: string) => requestCount(text, 'POST', '/api/v1.0/users', outcome)

t.test('metrics are off by default, and are served on a port of their own', async (t) => {
  t.equal((await build(t)).metricsUrl, undefined)
  const app = await build(t, { METRICS_PORT: '0' })
  t.equal((await app.inject('/metrics')).statusCode, 404)
  const reply = await fetch(app.metricsUrl ?? '')
  t.equal(reply.status, 200)
  t.match(reply.headers.get('content-type'), /^text\/plain; version=0\.0\.4/)
  t.equal((await fetch(new URL('/other', app.metricsUrl))).status, 404)
})

t.test('counters match the requests, and no label identifies a user', async (t) => {
  const app = await build(t, { METRICS_PORT: '0' })
  for (const series of ['hash_duration_seconds', 'hash_wait_seconds']) {
    t.equal(sampleOf(await scrape(app), `mobile_signup_${series}_count`), 0, 'the start is not counted')
  }
  const bodies = await Promise.all(Array.from({ length: 20 }, () => signUpBody()))
  await Promise.all(bodies.map((body) => client(app).signUp(body)))
  await client(app).signUp(await signUpBody({ password: 'short', password2: 'short' }))
  await client(app).signUp({ ...(await signUpBody()), sms_code: 'wrong' })
  const mobile = newMobile()
  await app.inject(`/${mobile}?mobile=${mobile}`)
  await app.inject('/health/live')
  await app.inject('/health/ready')

  const text = await scrape(app)
  t.equal(signUpCount(text, 'registered'), 20)
  t.equal(signUpCount(text, 'wrong_code'), 1)
  t.equal(signUpCount(text, 'password_length'), 1)
  t.equal(requestCount(text, 'GET', 'none', 'no_such_route'), 1)
  t.notMatch(text, '/health/', 'probes are not counted')
  t.equal(sampleOf(text, 'mobile_signup_hash_duration_seconds_count'), 20)
  t.equal(sampleOf(text, 'mobile_signup_hash_wait_seconds_count'), 20)
  // Postgres: 20 INSERTs. Redis: 21 claims, and 20 times a session with the end of the claim. Both: the checks of the probe and
  // of the scrapes, at most one a second.
  t.ok(Number(sampleOf(text, 'mobile_signup_store_round_trip_seconds_count{store="postgres"}')) >= 21)
  t.ok(Number(sampleOf(text, 'mobile_signup_store_round_trip_seconds_count{store="redis"}')) >= 42)
  t.equal(sampleOf(text, 'mobile_signup_store_errors_total{store="postgres"}'), 0)
  t.match(text, 'nodejs_eventloop_lag_p99_seconds')
  for (const { mobile, password, sms_code } of bodies) {
    for (const secret of [mobile, password, sms_code]) t.notMatch(text, secret)
  }
  t.notMatch(text, /\{.*1[3-9]\d{9}.*\}/, 'no label contains a mobile')
})

t.test('sent codes, used codes and the refusals of each limit are counted', async (t) => {
  const app = await build(t, { METRICS_PORT: '0' })
  const { logIn, sendCode, signUp } = client(app)
  const body = await signUpBody()
  const { mobile } = body
  const { ticket } = (await sendCode(mobile)).json().data
  t.equal((await sendCode(mobile)).statusCode, 429)
  const sms_code = await redis.get(`sms_code_${mobile}`)
  const wrong = sms_code === '000000' ? '111111' : '000000'
  for (let n = 0; n < 6; n++) await signUp({ ...body, sms_code: wrong })
  t.equal((await signUp({ ...body, sms_code, ticket })).statusCode, 201)
  t.equal((await signUp({ ...body, sms_code, ticket })).headers['idempotent-replayed'], 'true')
  for (let n = 0; n < 6; n++) await logIn({ mobile, password: 'wrong' })

  const text = await scrape(app)
  t.equal(sampleOf(text, 'mobile_signup_codes_sent_total'), 1)
  t.equal(sampleOf(text, 'mobile_signup_codes_used_total'), 1, 'a replay uses no code')
  const refused = { sms_resend: 1, guesses_guesser: 1, login_mobile_network: 1 }
  for (const [limit, count] of Object.entries({ ...refused, sms_all: 0, guesses_mobile: 0 })) {
    t.equal(sampleOf(text, `mobile_signup_limit_refusals_total{limit="${limit}"}`), count, limit)
  }
  t.notMatch(text, ticket)
})

t.test('a message counts as sent unless it was certainly not sent', async (t) => {
  const webhook = await startWebhook(t)
  const app = await build(t, { METRICS_PORT: '0', SMS_WEBHOOK_URL: webhook.url })
  for (const [status, count] of [
    [200, 1],
    [500, 2],
    [400, 2]
  ] as const) {
    webhook.answer = answerWith(status)
    await client(app).sendCode(newMobile())
    t.equal(sampleOf(await scrape(app), 'mobile_signup_codes_sent_total'), count, `${status}`)
  }
})

t.test('the failures of every route are counted from 0, so that an alert sees the first', async (t) => {
  const text = await scrape(await build(t, { METRICS_PORT: '0' }))
  for (const [method, route] of [
    ['POST', '/api/v1.0/users'],
    ['DELETE', '/api/v1.0/session']
  ]) {
    const labels = `method="${method}",route="${route}",outcome="internal_error"`
    t.equal(sampleOf(text, `mobile_signup_request_duration_seconds_count{${labels}}`), 0)
  }
  t.notMatch(text, 'route="/health/live"')
})

t.test('failed round trips to a store are counted', async (t) => {
  const proxy = await openProxy(t, 'REDIS_URL')
  const app = await build(t, { METRICS_PORT: '0', REDIS_URL: proxy.url })
  const body = await signUpBody()
  await proxy.apply('refuse')
  await client(app).signUp(body)
  const text = await scrape(app)
  t.ok(Number(sampleOf(text, 'mobile_signup_store_errors_total{store="redis"}')) > 0)
  t.equal(signUpCount(text, 'storage_unavailable'), 1)
})

t.test('gauges show the hash queue and the Postgres pool at the time of the scrape', async (t) => {
  // Each of these hashes takes about 20 ms, so that the queue is not empty before the scrape.
  const hashing = await build(t, { METRICS_PORT: '0', HASH_THREADS: '1', HASH_PASSES: '1000' })
  const hashes = Array.from({ length: 50 }, () => hashing.mobileSignup.passwords.hash('correct horse'))
  const queued = await scrape(hashing)
  t.ok(Number(sampleOf(queued, 'mobile_signup_hash_queue_length')) > 0)
  t.ok(Number(sampleOf(queued, 'mobile_signup_hash_expected_wait_seconds')) > 0)
  await Promise.all(hashes)
  t.equal(sampleOf(await scrape(hashing), 'mobile_signup_hash_queue_length'), 0)

  const inserting = await build(t, { METRICS_PORT: '0' })
  const inserts = await holdInserts(t)
  const replies = [client(inserting).signUp(await signUpBody()), client(inserting).signUp(await signUpBody())]
  await inserts.arrived(2)
  t.equal(sampleOf(await scrape(inserting), 'mobile_signup_postgres_connections{state="busy"}'), 2)
  await inserts.release()
  await Promise.all(replies)
  t.equal(sampleOf(await scrape(inserting), 'mobile_signup_postgres_connections{state="busy"}'), 0)
})

t.test('metrics are served until a shutdown has answered the accepted requests', async (t) => {
  const app = await build(t, { METRICS_PORT: '0' })
  const url = await app.listen({ port: 0, host: '127.0.0.1' })
  const inserts = await holdInserts(t)
  const reply = client(url).signUp(await signUpBody())
  await inserts.arrived(1)
  const closed = app.close()
  await until('the shutdown has begun', () => app.lifecycle.isEnding)
  t.match(await scrape(app), 'mobile_signup_hash_queue_length 0')
  await inserts.release()
  t.equal((await reply).statusCode, 201)
  await closed
  await t.rejects(scrape(app))
})

t.test('a METRICS_PORT in use stops the start with one line and exit code 1', async (t) => {
  const failing = startService(t, { METRICS_PORT: new URL(stores.redisUrl).port })
  const working = startService(t, { METRICS_PORT: '0' })
  t.strictSame(await failing.exit, [1, null])
  t.match(failing.stderr, /^mobile-signup: listen EADDRINUSE: [^\n]*\n$/)
  await working.url()
  const [, metricsUrl = ''] = await working.waitFor(/Metrics at (http:[^"]+)/)
  t.equal((await fetch(metricsUrl)).status, 200)
})

t.test('the dashboard and the alerts query metrics, labels and outcomes that exist', async (t) => {
  const app = await build(t, { METRICS_PORT: '0' })
  await client(app).signUp(await signUpBody())
  const text = await scrape(app)
  const names = new Set([...text.matchAll(/^([a-z0-9_]+)[{ ]/gm)].map(([, name]) => name))
  const labels = new Set([...text.matchAll(/[{,]([a-z_]+)="/g)].map(([, label]) => label))
  // Prometheus adds these.
  for (const label of ['job', 'instance']) labels.add(label)

  const read = (file: string) => readFile(new URL(`../deploy/${file}`, import.meta.url), 'utf8')
  const dashboard = JSON.parse(await read('grafana-dashboard.json'))
  const rules = parse(await read('alerts.yaml'))
  const queries: string[] = [
    ...dashboard.panels.flatMap(({ targets = [] }) => targets.map(({ expr }: { expr: string }) => expr)),
    ...rules.groups.flatMap((group: { rules: { expr: string }[] }) => group.rules.map(({ expr }) => expr))
  ]
  t.ok(queries.length > 20)
  for (const query of queries) {
    for (const [name] of query.matchAll(/\b(mobile_signup|nodejs|process)_[a-z0-9_]+/g)) t.ok(names.has(name), name)
    for (const [, label] of query.matchAll(/([a-z_]+)\s*(?:=~|!~|!=|=)\s*"/g)) t.ok(labels.has(label), `${label}`)
    for (const [, list] of query.matchAll(/outcome(?:=~|!~|!=|=)"([a-z_|]+)"/g))
      for (const outcome of list?.split('|') ?? []) t.ok(outcome in outcomes, outcome)
  }
})
