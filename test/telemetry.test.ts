import { readFile } from 'node:fs/promises'
import type { FastifyInstance } from 'fastify'
import { pino } from 'pino'
import t from 'tap'
import { parse } from 'yaml'
import { outcomes } from '#src/outcomes.js'
import { serializers } from '#src/telemetry/log.js'
import { sampledWarnings } from '#src/telemetry/sampled-warnings.js'
import { client, statusAndErrno } from '../testkit/client.js'
import { movePerformanceClock } from '../testkit/moved-clock.js'
import { answerWith, startWebhook } from '../testkit/sms-webhook.js'
import { impatient, startTestbed } from '../testkit/testbed.js'
import { retried, until } from '../testkit/until.js'

const testbed = await startTestbed(t)
const { build, buildWithLog, cookieOf, holdInserts, holdRedisWrites, newMobile, openProxy } = testbed
const { postgres, redis, signUpBody } = testbed

const webhook = await startWebhook(t)
/** The application with metrics that several tests use. It is built before a test moves the clock. */
const measured = await build(t, { METRICS_PORT: '0', SMS_WEBHOOK_URL: webhook.url, EVENTS_WEBHOOK_URL: webhook.url })

t.test('a request is one line at level info; the cause of a fault has a line before it', async (t) => {
  const { app, lines } = await buildWithLog(t)
  const reqId = 'gateway-7f3a'
  async function signUp(changes = {}) {
    lines.length = 0
    const body = { ...(await signUpBody()), ...changes }
    const { statusCode } = await client(app).signUp(body, { headers: { 'x-request-id': reqId } })
    const mobile = `${body.mobile.slice(0, 3)}****${body.mobile.slice(7)}`
    const request = { method: 'POST', route: '/api/v1.0/users', mobile, status: statusCode, ms: Number, msg: 'request' }
    return { level: 30, reqId, ...request }
  }
  const registered = await signUp()
  t.match(lines, [{ ...registered, status: 201, outcome: 'registered' }])
  t.equal(lines.length, 1)
  const refused = await signUp({ sms_code: 'wrong' })
  t.match(lines, [{ ...refused, status: 422, outcome: 'wrong_code' }])
  t.equal(lines.length, 1, 'a refusal is no error')

  app.mobileSignup.users.insert = () => Promise.reject(new Error('a bug'))
  const failed = await signUp()
  t.match(lines, [
    { level: 50, reqId, err: { message: 'a bug' }, msg: 'internal_error' },
    { ...failed, status: 500, outcome: 'internal_error' }
  ])
  t.equal(lines.length, 2)
})

t.test('X-Request-Id is logged and returned, with mobiles masked, and replaced if it is no id', async (t) => {
  const { app, lines } = await buildWithLog(t)
  const mobile = '13812345678'
  const withMobile = `${mobile} m=${mobile} 86${mobile} 9${mobile}9 +86${mobile}x trace_${mobile}00000000`
  const ids = ['a', 'x'.repeat(128), '4bf92f3577b34da6:00f067aa0ba902b7-01', ...withMobile.split(' ')]
  const invalidIds = ['', ' ', 'a b', 'x'.repeat(129), '{"a":1}', '号', '%31%33%38%31%32%33%34%35%36%37%38']
  for (const [sent, logged] of [
    ...ids.map((id) => [id, id.replace(mobile, '138****5678')] as const),
    ...['138-1234-5678', '138.1234.5678', '138_1234:5678'].map((id) => [id, '138****5678'] as const),
    ...invalidIds.map((id) => [id, /^[0-9a-f-]{36}$/] as const)
  ]) {
    const reply = await app.inject({ url: '/api/v1.0/session', headers: { 'x-request-id': sent } })
    const { reqId } = lines.at(-1) ?? {}
    t.equal(reply.headers['x-request-id'], reqId, sent.slice(0, 40))
    t.match(reqId, logged)
    if (typeof logged === 'string') t.equal(reqId, logged)
  }
  for (const url of ['/nowhere', '/health/live', '/api/v1.0/%zz']) {
    const reply = await app.inject({ url, headers: { 'x-request-id': 'gateway-7f3a' } })
    t.equal(reply.headers['x-request-id'], 'gateway-7f3a', url)
  }
})

t.test('G7: no secret of a request is logged, also while a store fails, which is told at level warn', async (t) => {
  const { app, lines } = await buildWithLog(t, { LOG_LEVEL: 'trace', ...impatient })
  const { signUp } = client(app)
  const cookie = cookieOf(await signUp(await signUpBody()))
  const [duringPostgresFailure, duringRedisFailure] = [await signUpBody(), await signUpBody()]
  const [passwordAsMobile, inUrl] = [await signUpBody(), await signUpBody()]

  const inserts = await holdInserts(t)
  t.equal((await signUp(duringPostgresFailure, { headers: { cookie } })).statusCode, 503)
  await inserts.release()
  const writes = await holdRedisWrites(t)
  t.equal((await signUp(duringRedisFailure, { headers: { cookie } })).statusCode, 503)
  await writes.release()
  await signUp({ ...passwordAsMobile, mobile: passwordAsMobile.password })
  await app.inject({ url: `/api/v1.0/users/${inUrl.mobile}?password=${inUrl.password}`, headers: { cookie } })
  await signUp(`{"password": "${inUrl.password}"`)

  const causes = lines.filter(({ msg }) => `${msg}`.startsWith('a round trip'))
  t.match(causes, [
    { level: 40, err: { message: /timeout/ }, msg: 'a round trip to Postgres failed' },
    { level: 40, err: { message: 'Command timed out' }, msg: 'a round trip to Redis failed' }
  ])
  const errors = lines.filter(({ level }) => Number(level) > 40)
  t.strictSame(errors, [], 'an outage is no error')
  const log = JSON.stringify(lines)
  for (const { mobile, password, sms_code } of [duringRedisFailure, duringPostgresFailure, passwordAsMobile, inUrl]) {
    for (const secret of [mobile, password, sms_code]) t.notMatch(log, secret)
  }
  t.notMatch(log, cookie.slice('sid='.length).split('.')[0])
})

t.test('G7: of an error only its type, message, stack and code are logged, without what a store quotes', async (t) => {
  const { mobile, sms_code } = await signUpBody()
  const insert = `INSERT INTO users (name, mobile, password_hash) VALUES ('', $1, '')`
  await postgres.query(insert, [mobile])
  const conflict = await postgres.query(insert, [mobile]).catch((error) => error)
  t.match(conflict.detail, mobile, 'Postgres quotes the row')
  const refusal = await redis.call('NOSUCH', sms_code, mobile).then(String, (error) => error)
  t.match(refusal.message, sms_code, 'Redis quotes the arguments')
  t.strictSame(refusal.command.args, [sms_code, mobile])

  const lines: string[] = []
  const log = pino({ serializers }, { write: (line) => void lines.push(line) })
  for (const error of [conflict, refusal, new Error(`of ${mobile}`, { cause: refusal })]) {
    log.error({ err: error }, 'a message')
    // Then pino takes the message of the error.
    log.error(error)
  }
  t.equal(lines.length, 6)
  for (const line of lines) {
    t.match(line, /duplicate key value|unknown command/, 'the cause is logged')
    for (const secret of [mobile, sms_code]) t.notMatch(line, secret)
    const others = Object.keys(JSON.parse(line).err).filter((key) => !/^(type|message|stack|code)$/.test(key))
    t.strictSame(others, [])
  }
})

t.test('an X-Forwarded-For that does not tell the client is logged, at most once a minute each', async (t) => {
  const { app, lines } = await buildWithLog(t, { TRUST_PROXY: '10.0.0.0/8,::ffff:192.0.2.7,2001:db8::/32' })
  const { pass } = movePerformanceClock(t)
  const ignored = /^X-Forwarded-For is ignored: TRUST_PROXY does not name this peer/
  const chosen = /^every address of X-Forwarded-For is in TRUST_PROXY/
  for (const [peer, forwardedFor, warning] of [
    ['10.0.0.1', '203.0.113.1'],
    // The client lies, but has not chosen its address.
    ['10.0.0.1', '10.0.0.9, 203.0.113.1'],
    ['10.0.0.1', '203.0.113.1, 192.0.2.7:443, [2001:db8::7]:443'],
    ['10.0.0.1', undefined],
    ['198.51.100.1', '203.0.113.1', ignored],
    ['198.51.100.1', '203.0.113.1'],
    ['::ffff:10.0.0.1', '10.0.0.9, 10.0.0.8:80', chosen],
    ['10.0.0.1', '192.0.2.7'],
    ['a minute later'],
    ['10.0.0.1', '[2001:db8::9]:5000', chosen],
    ['203.0.113.1', '203.0.113.1', ignored]
  ] as const) {
    if (peer === 'a minute later') {
      pass(60_000)
      continue
    }
    lines.length = 0
    const headers = forwardedFor === undefined ? {} : { 'x-forwarded-for': forwardedFor }
    await app.inject({ url: '/api/v1.0/session', remoteAddress: peer, headers })
    const warnings = lines.filter(({ level }) => level === 40)
    t.match(warnings, warning ? [{ msg: warning, peer }] : [], `${peer}: ${forwardedFor}`)
    t.equal(warnings.length, warning ? 1 : 0)
  }
})

t.test(
  'of requests that anybody can send without end 100 lines a second are written, the others counted',
  async (t) => {
    const { app, lines } = await buildWithLog(t)
    let now = performance.now() + 3_600_000
    t.intercept(performance, 'now', { value: () => now })
    const urls = { no_such_route: '/nowhere', bad_request: '/api/v1.0/%zz', not_logged_in: '/api/v1.0/session' }
    for (const [kind, url] of Object.entries(urls)) {
      lines.length = 0
      for (let n = 0; n < 103; n++) await app.inject(url)
      now += 1_000
      for (let n = 0; n < 2; n++) await app.inject(url)
      t.equal(lines.filter(({ outcome }) => outcome === kind).length, 102)
      const suppressed = lines.map((line) => line.suppressed)
      t.strictSame(suppressed, [...Array(100).fill(undefined), 3, undefined], kind)
    }
    lines.length = 0
    for (let n = 0; n < 103; n++) await client(app).signUp('{}')
    t.equal(lines.length, 103, 'all others are always logged')
  }
)

for (const store of ['REDIS_URL', 'DATABASE_URL'] as const) {
  t.test(
    `while a store is away (${store}), each request has its line, and no other line grows with them`,
    async (t) => {
      const proxy = await openProxy(t, store)
      const { app, lines } = await buildWithLog(t, { [store]: proxy.url })
      await proxy.apply('refuse')
      const bodies = await Promise.all(Array.from({ length: 60 }, () => signUpBody()))
      const startedAt = performance.now()
      // Two waves: connections that close fail in another way than those that cannot be opened.
      for (const wave of [bodies.slice(0, 10), bodies.slice(10)]) {
        const replies = await Promise.all(wave.map((body) => client(app).signUp(body)))
        t.ok(replies.every(({ statusCode }) => statusCode === 503))
      }
      const intervals = 1 + Math.floor((performance.now() - startedAt) / 10_000)
      const requestLines = lines.filter(({ outcome }) => outcome === 'storage_unavailable')
      t.equal(new Set(requestLines.map(({ reqId }) => reqId)).size, bodies.length)
      t.equal(requestLines.length, bodies.length)
      const otherCount = lines.length - requestLines.length
      t.ok(otherCount > 0 && otherCount < 10 * intervals, `${otherCount} other lines`)

      await proxy.heal()
      const body = await signUpBody()
      t.equal((await retried(() => client(app).signUp(body))).statusCode, 201)
      await until('the return of the store is logged', () =>
        lines.some(({ msg }) => /^(Redis|Postgres) answers again$/.test(`${msg}`))
      )
    }
  )
}

t.test('a warning is logged once in ten seconds, then with the number of those left out', async (t) => {
  const written: unknown[] = []
  const write = (line: string) => {
    const { err, suppressed } = JSON.parse(line)
    written.push([err.message, suppressed])
  }
  const warn = sampledWarnings(pino({}, { write }))
  const { pass } = movePerformanceClock(t)
  for (const cause of ['away', 'away', 'away', 'slow']) warn(new Error(cause), 'a failure')
  pass(10_000)
  for (const cause of ['away', 'slow']) warn(new Error(cause), 'a failure')
  t.strictSame(written, [
    ['away', undefined],
    ['slow', undefined],
    ['away', 2],
    ['slow', undefined]
  ])
  for (let n = 0; n < 1_000; n++) warn(new Error(`cause ${n}`), 'a failure')
  t.ok(written.length <= 105, `${written.length} lines, however many causes there are`)
})

/** Returns the value of a series in a scrape, by its name and labels. */
function sampleOf(text: string, series: string): number | undefined {
  const line = text.split('\n').find((candidate) => candidate.startsWith(`mobile_signup_${series} `))
  return line === undefined ? undefined : Number(line.slice(line.lastIndexOf(' ')))
}

/** Returns the number of requests that were answered with an outcome. */
const requestCount = (text: string, outcome: string, route = '/api/v1.0/users', method = 'POST') =>
  sampleOf(text, `request_duration_seconds_count{method="${method}",route="${route}",outcome="${outcome}"}`)

const scrape = async (app: FastifyInstance) => (await fetch(app.metricsUrl ?? '')).text()

t.test('metrics are off by default, on a port of their own, and failures are counted from 0', async (t) => {
  t.equal((await build(t)).metricsUrl, undefined)
  t.equal((await measured.inject('/metrics')).statusCode, 404)
  t.equal((await fetch(new URL('/other', measured.metricsUrl))).status, 404)
  const reply = await fetch(measured.metricsUrl ?? '')
  t.match(reply.headers.get('content-type'), /^text\/plain; version=0\.0\.4/)
  const text = await reply.text()
  // An alert does not see the first failure of a series that begins with 1.
  t.equal(requestCount(text, 'internal_error'), 0)
  t.equal(requestCount(text, 'internal_error', '/api/v1.0/session', 'DELETE'), 0)
  for (const series of ['store_errors_total{store="redis"}', 'limit_refusals_total{limit="sms_all"}'])
    t.equal(sampleOf(text, series), 0)
  t.equal(sampleOf(text, 'hash_duration_seconds_count'), 0, 'the start is not counted')
})

t.test('G7: counters match the requests, and no label identifies a user', async (t) => {
  const { sendCode, signUp, logIn } = client(measured)
  for (let n = 0; n < 5; n++) await signUp(await signUpBody())
  const body = await signUpBody()
  const { mobile } = body
  const { ticket } = (await sendCode(mobile)).json().data
  t.equal((await sendCode(mobile)).statusCode, 429)
  const sms_code = await redis.get(`sms_code_${mobile}`)
  for (let n = 0; n < 6; n++) await signUp({ ...body, sms_code: sms_code === '000000' ? '111111' : '000000' })
  t.equal((await signUp({ ...body, sms_code, ticket })).statusCode, 201)
  t.equal((await signUp({ ...body, sms_code, ticket })).headers['idempotent-replayed'], 'true')
  for (let n = 0; n < 6; n++) await logIn({ mobile, password: 'wrong' })
  await measured.inject(`/${mobile}?mobile=${mobile}`)
  await measured.inject('/health/ready')

  for (const status of [500, 400]) {
    webhook.answer = answerWith(status)
    await sendCode(newMobile())
  }

  const text = await scrape(measured)
  t.equal(requestCount(text, 'registered'), 7)
  t.equal(requestCount(text, 'wrong_code'), 5)
  t.equal(requestCount(text, 'no_such_route', 'none', 'GET'), 2, 'also /metrics')
  // Six sign-ups, the check of the repeat, and five failed logins.
  for (const series of ['hash_duration_seconds_count', 'hash_wait_seconds_count']) t.equal(sampleOf(text, series), 12)
  t.equal(sampleOf(text, 'codes_sent_total'), 2, 'the message that got a 500 may be on its way')
  t.equal(sampleOf(text, 'codes_used_total'), 1, 'a repeat uses no code')
  const refusals = { sms_resend: 1, guesses_guesser: 1, login_mobile_network: 1, sms_all: 0, guesses_mobile: 0 }
  for (const [limit, count] of Object.entries(refusals))
    t.equal(sampleOf(text, `limit_refusals_total{limit="${limit}"}`), count, limit)
  for (const store of ['postgres', 'redis']) {
    t.ok(Number(sampleOf(text, `store_round_trip_seconds_count{store="${store}"}`)) > 6)
    t.equal(sampleOf(text, `store_errors_total{store="${store}"}`), 0)
  }
  t.notMatch(text, '/health/', 'probes are not counted')
  for (const secret of [mobile, body.password, `${sms_code}"`, ticket]) t.notMatch(text, secret)
})

t.test('gauges show the hash queue and the Postgres pool at the time of the scrape', async (t) => {
  // It delivers no events. Each delivery takes a Postgres connection, which the gauge would count.
  const app = await build(t, { METRICS_PORT: '0' })
  const inserts = await holdInserts(t)
  const replies = [client(app).signUp(await signUpBody()), client(app).signUp(await signUpBody())]
  await inserts.arrived(2)
  // Both take long enough for the scrape.
  const { hash } = app.mobileSignup.passwords
  const hashes = Array.from({ length: 200 }, () => hash('correct horse'))
  const text = await scrape(app)
  t.equal(sampleOf(text, 'postgres_connections{state="busy"}'), 2)
  t.ok(Number(sampleOf(text, 'hash_queue_length')) > 0)
  await inserts.release()
  await Promise.all([...replies, ...hashes])
  t.equal(sampleOf(await scrape(app), 'hash_queue_length'), 0)
  // The check of the first scrape may still have a connection.
  await until(
    'no connection is busy',
    async () => sampleOf(await scrape(app), 'postgres_connections{state="busy"}') === 0
  )
})

t.test('the dashboard and the alerts query metrics, labels and outcomes that exist', async (t) => {
  const text = await scrape(measured)
  const names = new Set([...text.matchAll(/^([a-z0-9_]+)[{ ]/gm)].map(([, name]) => name))
  // Prometheus adds the last two.
  const labels = new Set([...[...text.matchAll(/[{,]([a-z_]+)="/g)].map(([, label]) => label), 'job', 'instance'])
  const read = (file: string) => readFile(new URL(`../deploy/${file}`, import.meta.url), 'utf8')
  const { panels } = JSON.parse(await read('grafana-dashboard.json'))
  const { groups } = parse(await read('alerts.yaml'))
  const queries: string[] = [
    ...panels.flatMap(({ targets = [] }) => targets.map(({ expr }: { expr: string }) => expr)),
    ...groups.flatMap(({ rules }: { rules: { expr: string }[] }) => rules.map(({ expr }) => expr))
  ]
  t.ok(queries.length > 20)
  for (const query of queries) {
    for (const [name] of query.matchAll(/\b(mobile_signup|nodejs|process)_[a-z0-9_]+/g)) t.ok(names.has(name), name)
    for (const [, label] of query.matchAll(/([a-z_]+)\s*(?:=~|!~|!=|=)\s*"/g)) t.ok(labels.has(label), `${label}`)
    for (const [, list = ''] of query.matchAll(/outcome(?:=~|!~|!=|=)"([a-z_|]+)"/g))
      for (const outcome of list.split('|')) t.ok(outcome in outcomes, outcome)
  }
})

t.test('a store that is away, or cannot be written, is named, and the instance stays ready', async (t) => {
  const proxies = { Redis: await openProxy(t, 'REDIS_URL'), Postgres: await openProxy(t, 'DATABASE_URL') }
  const urls = { REDIS_URL: proxies.Redis.url, DATABASE_URL: proxies.Postgres.url }
  const app = await build(t, { ...urls, STORE_TIMEOUT_MS: '1000', METRICS_PORT: '0' })
  const { signUp, whoAmI } = client(app)
  async function untilFailing(names: string, available: string) {
    await until(`failing: ${names}`, async () => {
      const reply = await app.inject('/health/ready')
      t.strictSame(statusAndErrno(reply), [200, '0'])
      return reply.json().data.failing.join() === names
    })
    await until(`available: ${available}`, async () => {
      const text = await scrape(app)
      return (
        ['postgres', 'redis'].map((store) => sampleOf(text, `store_available{store="${store}"}`)).join() === available
      )
    })
  }
  await untilFailing('', '1,1')
  const body = await signUpBody()
  const cookie = cookieOf(await retried(() => signUp(body)))
  for (const [name, available] of [
    ['Redis', '1,0'],
    ['Postgres', '0,1']
  ] as const) {
    for (const fault of ['refuse', 'stall'] as const) {
      await proxies[name].apply(fault)
      await untilFailing(name, available)
      t.equal((await app.inject('/health/live')).statusCode, 200)
      const refused = await signUp(await signUpBody())
      t.strictSame([...statusAndErrno(refused), refused.headers['retry-after']], [503, '4001', '1'])
      if (name === 'Postgres') t.equal((await retried(() => whoAmI(cookie))).statusCode, 200, 'sessions go on')
      await proxies[name].heal()
      await untilFailing('', '1,1')
    }
    const failures = sampleOf(await scrape(app), `store_errors_total{store="${name.toLowerCase()}"}`)
    t.ok(Number(failures) > 0, 'failed round trips are counted')
  }

  const setReadOnly = async (value: string) => {
    await postgres.query(`ALTER SYSTEM SET default_transaction_read_only = ${value}`)
    await postgres.query('SELECT pg_reload_conf()')
  }
  await redis.config('SET', 'maxmemory', '1')
  await untilFailing('Redis', '1,0')
  await redis.config('SET', 'maxmemory', '0')
  await setReadOnly('on')
  await untilFailing('Postgres', '0,1')
  await setReadOnly('off')
  await untilFailing('', '1,1')
})

t.test('ready is 503 while the table of the users is not there', async (t) => {
  const answer = async () => {
    const reply = await measured.inject('/health/ready')
    return `${reply.statusCode} ${reply.json().data.failing}`
  }
  await postgres.query('ALTER TABLE users RENAME TO former_users')
  t.teardown(() => postgres.query('ALTER TABLE IF EXISTS former_users RENAME TO users'))
  await until('ready tells it', async () => (await answer()) === '503 no schema')
  t.equal((await measured.inject('/health/live')).statusCode, 200)
  await postgres.query('ALTER TABLE former_users RENAME TO users')
  await until('ready is back', async () => (await answer()) === '200 ')
})

t.test('probes ask the stores at most once a second, are not logged, and keep their status', async (t) => {
  const { app, lines } = await buildWithLog(t, { LEGACY_STATUS: 'true' })
  const countChecks = async () => Number(/cmdstat_set:calls=(\d+)/.exec(await redis.info('commandstats'))?.[1] ?? 0)
  const checksBefore = await countChecks()
  const startedAt = performance.now()
  await Promise.all(Array.from({ length: 100 }, () => [app.inject('/health/ready'), app.inject('/health/live')]).flat())
  const checks = (await countChecks()) - checksBefore
  // A busy machine may take seconds for the probes.
  t.ok(checks >= 1 && checks <= 1 + Math.floor((performance.now() - startedAt) / 1_000), `${checks} checks`)
  t.strictSame(lines, [])
  await until('a later probe asks the stores again', async () => {
    await app.inject('/health/ready')
    return (await countChecks()) > checksBefore + checks
  })
  t.equal((await app.inject('/health/nowhere')).statusCode, 200)
  app.lifecycle.announceShutdown()
  const reply = await app.inject('/health/ready')
  t.match([...statusAndErrno(reply), reply.json().data], [503, '4500', { failing: ['shutting down'] }])
})
