import { once } from 'node:events'
import { readFile } from 'node:fs/promises'
import { type AddressInfo, createServer } from 'node:net'
import type { FastifyInstance } from 'fastify'
import t from 'tap'
import { parse } from 'yaml'
import { outcomes } from '../src/outcomes.js'
import { FaultProxy } from './fault-proxy.js'
import { build, holdInserts, newMobile, post, signUpBody, stores, until } from './helper.js'
import { named, said, start } from './service.js'

async function scrape(app: FastifyInstance): Promise<string> {
  const reply = await fetch(app.metrics?.url ?? '')
  return reply.text()
}

/** The value of a series, by its name and its labels as they are scraped. */
function sampleOf(text: string, series: string): number | undefined {
  const line = text.split('\n').find((candidate) => candidate.startsWith(`${series} `))
  return line === undefined ? undefined : Number(line.slice(series.length + 1))
}

const signUps = (outcome: string) => `{method="POST",route="/api/v1.0/users",outcome="${outcome}"}`

t.test('metrics are off by default, and stand on a port of their own', async (t) => {
  t.equal((await build(t)).metrics, undefined)
  const app = await build(t, { METRICS_PORT: '0' })
  t.equal((await app.inject('/metrics')).statusCode, 404)
  const reply = await fetch(app.metrics?.url ?? '')
  t.equal(reply.status, 200)
  t.match(reply.headers.get('content-type'), /^text\/plain; version=0\.0\.4/)
  t.equal((await fetch(new URL('/other', app.metrics?.url))).status, 404)
})

t.test('they agree with what was done, and name nobody', async (t) => {
  const app = await build(t, { METRICS_PORT: '0' })
  const bodies = await Promise.all(Array.from({ length: 20 }, () => signUpBody()))
  await Promise.all(bodies.map((body) => post(app, body)))
  const [wrong] = await Promise.all([
    signUpBody(),
    post(app, { ...(await signUpBody()), password: 'short', password2: 'short' })
  ])
  await post(app, { ...wrong, sms_code: 'wrong' })
  const stray = newMobile()
  await app.inject(`/${stray}?mobile=${stray}`)
  await app.inject('/health/live')
  await app.inject('/health/ready')

  const text = await scrape(app)
  for (const [outcome, count] of [
    ['registered', 20],
    ['wrong_code', 1],
    ['password_length', 1]
  ] as const) {
    t.equal(sampleOf(text, `mobile_signup_request_duration_seconds_count${signUps(outcome)}`), count, outcome)
  }
  t.equal(
    sampleOf(text, 'mobile_signup_request_duration_seconds_count{method="GET",route="none",outcome="no_such_route"}'),
    1
  )
  t.notMatch(text, '/health/', 'probes are none of the requests')
  t.equal(sampleOf(text, 'mobile_signup_hash_duration_seconds_count'), 20)
  t.equal(sampleOf(text, 'mobile_signup_hash_wait_seconds_count'), 20)
  // An INSERT each, and the probe; a take, and the session with the marker each.
  t.equal(sampleOf(text, 'mobile_signup_store_round_trip_seconds_count{store="postgres"}'), 21)
  t.ok(Number(sampleOf(text, 'mobile_signup_store_round_trip_seconds_count{store="redis"}')) >= 41)
  t.equal(sampleOf(text, 'mobile_signup_store_errors_total{store="postgres"}'), 0)
  t.match(text, 'nodejs_eventloop_lag_p99_seconds')
  for (const { mobile, password, sms_code } of bodies) {
    for (const secret of [mobile, password, sms_code]) t.notMatch(text, secret)
  }
  t.notMatch(text, /\{.*1[3-9]\d{9}.*\}/, 'no label holds a mobile')
})

t.test('a store that fails is counted', async (t) => {
  const proxy = await FaultProxy.open(stores.redisUrl)
  t.teardown(() => proxy.close())
  const app = await build(t, { METRICS_PORT: '0', REDIS_URL: proxy.url })
  const body = await signUpBody()
  await proxy.apply('refuse')
  await post(app, body)
  const text = await scrape(app)
  t.ok(Number(sampleOf(text, 'mobile_signup_store_errors_total{store="redis"}')) > 0)
  t.equal(sampleOf(text, `mobile_signup_request_duration_seconds_count${signUps('storage_unavailable')}`), 1)
})

t.test('the queue and the pool are what they are at the scrape', async (t) => {
  const app = await build(t, { METRICS_PORT: '0', HASH_THREADS: '1', HASH_MEMORY_KIB: '65536', HASH_PASSES: '20' })
  const hashes = Array.from({ length: 4 }, () => app.passwords.hash('correct horse'))
  const queued = await scrape(app)
  t.ok(Number(sampleOf(queued, 'mobile_signup_hash_queue_length')) > 0)
  t.ok(Number(sampleOf(queued, 'mobile_signup_hash_expected_wait_seconds')) > 0)
  await Promise.all(hashes)
  t.equal(sampleOf(await scrape(app), 'mobile_signup_hash_queue_length'), 0)

  // So long that no INSERT gives up before the barrier.
  const patient = await build(t, { METRICS_PORT: '0', STORE_TIMEOUT_MS: '30000' })
  const inserts = await holdInserts()
  const replies = [post(patient, await signUpBody()), post(patient, await signUpBody())]
  await inserts.arrived(2)
  const held = await scrape(patient)
  t.equal(sampleOf(held, 'mobile_signup_postgres_connections{state="busy"}'), 2)
  await inserts.release()
  await Promise.all(replies)
  t.equal(sampleOf(await scrape(patient), 'mobile_signup_postgres_connections{state="busy"}'), 0)
})

t.test('they can be scraped while a shutdown finishes what was accepted, and hold up none', async (t) => {
  const app = await build(t, { METRICS_PORT: '0', STORE_TIMEOUT_MS: '30000' })
  await app.listen({ port: 0, host: '127.0.0.1' })
  const inserts = await holdInserts()
  const { port } = app.server.address() as AddressInfo
  const reply = fetch(`http://127.0.0.1:${port}/api/v1.0/users`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify(await signUpBody())
  })
  await inserts.arrived(1)
  const closed = app.close()
  await until(async () => app.connections.closing)
  t.match(await scrape(app), 'mobile_signup_hash_queue_length 0')
  await inserts.release()
  t.equal((await reply).status, 201)
  await closed
  await t.rejects(scrape(app))
})

t.test('a port that is taken stops the start, with one line and exit code 1', async (t) => {
  const taken = createServer().listen(0, '127.0.0.1')
  t.teardown(() => taken.close())
  await once(taken, 'listening')
  const { port } = taken.address() as AddressInfo
  const run = start(t, { ...named, METRICS_PORT: `${port}` })
  t.strictSame(await run.exit, [1, null])
  t.match(run.output.stderr, /^mobile-signup: listen EADDRINUSE: [^\n]*\n$/)
  const free = start(t, { ...named, METRICS_PORT: '0' })
  const [, url] = await said(free, /Metrics at (http:[^"]+)/)
  await said(free, /Server listening at/)
  t.equal((await fetch(`${url}`)).status, 200)
})

t.test('the dashboard and the alerts ask for what a scrape has', async (t) => {
  const app = await build(t, { METRICS_PORT: '0' })
  await post(app, await signUpBody())
  const text = await scrape(app)
  const names = new Set([...text.matchAll(/^([a-z0-9_]+)[{ ]/gm)].map(([, name]) => name))
  const labels = new Set([...text.matchAll(/[{,]([a-z_]+)="/g)].map(([, label]) => label))
  for (const added of ['job', 'instance']) labels.add(added)

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
