import { mock } from 'node:test'
import { pino } from 'pino'
import t, { type Test } from 'tap'
import type { Environment } from '#src/config/config.js'
import { serializers } from '#src/telemetry/log.js'
import { sampledWarnings } from '#src/telemetry/sampled-warnings.js'
import { client } from '../testkit/client.js'
import { impatient, startTestbed } from '../testkit/testbed.js'
import { retried, until } from '../testkit/until.js'

const { build, cookieOf, holdInserts, holdRedisWrites, newMobile, openProxy, postgres, redis, signUpBody } =
  await startTestbed(t)

/** Builds an application whose log lines are collected. */
async function buildWithLog(t: Test, env: Environment = {}) {
  const lines: Record<string, unknown>[] = []
  const app = await build(t, env, { logStream: { write: (line) => void lines.push(JSON.parse(line)) } })
  return { app, lines }
}

t.test('a request is one log line at level info, with what operators need', async (t) => {
  const { app, lines } = await buildWithLog(t)
  const body = await signUpBody()
  await client(app).signUp(body, { headers: { 'x-request-id': 'gateway-7f3a' } })
  t.equal(lines.length, 1)
  t.match(lines[0], {
    level: 30,
    reqId: 'gateway-7f3a',
    method: 'POST',
    route: '/api/v1.0/users',
    mobile: `${body.mobile.slice(0, 3)}****${body.mobile.slice(7)}`,
    status: 201,
    outcome: 'registered',
    ms: Number,
    msg: 'request'
  })
})

t.test(
  'X-Request-Id is logged and returned, masked if it has a mobile number, and replaced if it is no id',
  async (t) => {
    const { app, lines } = await buildWithLog(t)
    const safeIds = ['a', 'x'.repeat(128), '4bf92f3577b34da6:00f067aa0ba902b7-01']
    const unsafeIds = [
      '',
      ' ',
      'a b',
      'x'.repeat(129),
      '{"a":1}',
      '号',
      [...newMobile()].map((digit) => `%3${digit}`).join('')
    ]
    const mobile = '13812345678'
    for (const id of [
      mobile,
      `m=${mobile}`,
      `86${mobile}`,
      `0${mobile}`,
      `9${mobile}9`,
      `+86${mobile}x`,
      `trace_${mobile}00000000`,
      '138-1234-5678',
      '138.1234.5678',
      '138_1234:5678'
    ]) {
      const reply = await app.inject({ url: '/api/v1.0/session', headers: { 'x-request-id': id } })
      t.equal(reply.headers['x-request-id'], id.replace(/138.*5678/, '138****5678'))
      t.equal(lines.at(-1)?.reqId, reply.headers['x-request-id'])
    }
    for (const id of [...safeIds, ...unsafeIds]) {
      const reply = await app.inject({ url: '/api/v1.0/session', headers: { 'x-request-id': id } })
      const reqId = lines.at(-1)?.reqId
      t.equal(reply.headers['x-request-id'], reqId)
      if (unsafeIds.includes(id)) t.match(reqId, /^[0-9a-f-]{36}$/, `not ${id.slice(0, 20)}`)
      else t.equal(reqId, id)
    }
    for (const url of ['/nowhere', '/health/live', '/api/v1.0/%zz']) {
      const reply = await app.inject({ url, headers: { 'x-request-id': 'gateway-7f3a' } })
      t.equal(reply.headers['x-request-id'], 'gateway-7f3a', url)
    }
  }
)

t.test('G7: no secret of a request is logged, also while a store fails', async (t) => {
  const { app, lines } = await buildWithLog(t, { LOG_LEVEL: 'trace', ...impatient })
  const cookie = cookieOf(await client(app).signUp(await signUpBody()))
  const duringPostgresFailure = await signUpBody()
  const duringRedisFailure = await signUpBody()
  const passwordAsMobile = await signUpBody()
  const inUrl = await signUpBody()

  const inserts = await holdInserts(t)
  t.equal((await client(app).signUp(duringPostgresFailure, { headers: { cookie } })).statusCode, 503)
  await inserts.release()
  const writes = await holdRedisWrites(t)
  t.equal((await client(app).signUp(duringRedisFailure, { headers: { cookie } })).statusCode, 503)
  await writes.release()
  await client(app).signUp({ ...passwordAsMobile, mobile: passwordAsMobile.password })
  await app.inject({ url: `/api/v1.0/users/${inUrl.mobile}?password=${inUrl.password}`, headers: { cookie } })
  await client(app).signUp(`{"password": "${inUrl.password}"`)

  const log = JSON.stringify(lines)
  t.match(
    lines.filter(({ msg }) => `${msg}`.startsWith('a round trip')),
    [{ err: { message: /timeout/ } }, { err: { message: 'Command timed out' } }],
    'the causes are logged'
  )
  for (const body of [duringRedisFailure, duringPostgresFailure, passwordAsMobile, inUrl]) {
    for (const secret of [body.mobile, body.password, body.sms_code]) t.notMatch(log, secret)
  }
  t.notMatch(log, cookie.slice('sid='.length).split('.')[0])
})

t.test('G7: of an error only its type, message, stack and code are logged, without what a store quotes', async (t) => {
  const body = await signUpBody()
  const insert = `INSERT INTO users (name, mobile, password_hash) VALUES ('', $1, '')`
  await postgres.query(insert, [body.mobile])
  const conflict = await postgres.query(insert, [body.mobile]).catch((error) => error)
  t.match(conflict.detail, body.mobile, 'Postgres quotes the row')
  const reply = await redis.call('NOSUCH', body.sms_code, body.mobile).then(String, (error) => error)
  t.match(reply.message, body.sms_code, 'Redis quotes the arguments')
  t.strictSame(reply.command.args, [body.sms_code, body.mobile])

  const lines: string[] = []
  const log = pino({ serializers }, { write: (line) => void lines.push(line) })
  for (const error of [conflict, reply, new Error(`of ${body.mobile}`, { cause: reply })]) {
    log.error({ err: error }, 'a message')
    // Then pino takes the message of the error.
    log.error(error)
  }
  t.equal(lines.length, 6)
  for (const line of lines) {
    t.match(line, /duplicate key value|unknown command/, 'the cause is logged')
    for (const secret of [body.mobile, body.sms_code]) t.notMatch(line, secret)
    const fields = Object.keys(JSON.parse(line).err)
    t.strictSame(
      fields.filter((field) => !['type', 'message', 'stack', 'code'].includes(field)),
      []
    )
  }
})

t.test('a wrong code, and a store that is away, are no errors: the store logs why at level warn', async (t) => {
  const { app, lines } = await buildWithLog(t, impatient)
  await client(app).signUp({ ...(await signUpBody()), sms_code: 'wrong' })
  const body = await signUpBody()
  const writes = await holdRedisWrites(t)
  await client(app).signUp(body, { headers: { 'x-request-id': 'r1' } })
  await writes.release()
  const levels = lines.map(({ level, outcome, msg }) => [level, outcome ?? msg])
  t.strictSame(
    levels.filter(([, what]) => what !== 'the connection to Redis failed'),
    [
      [30, 'wrong_code'],
      [40, 'a round trip to Redis failed'],
      [30, 'storage_unavailable']
    ]
  )
  const cause = lines.find(({ msg }) => msg === 'a round trip to Redis failed')
  t.match(cause, { err: { message: 'Command timed out' } })
})

t.test('the cause of a 500 is logged once at level error, with the id of the request', async (t) => {
  const { app, lines } = await buildWithLog(t)
  app.mobileSignup.users.insert = () => Promise.reject(new Error('a bug'))
  const reply = await client(app).signUp(await signUpBody(), { headers: { 'x-request-id': 'r1' } })
  t.equal(reply.statusCode, 500)
  t.match(lines, [
    { level: 50, reqId: 'r1', err: { message: 'a bug' }, msg: 'internal_error' },
    { level: 30, reqId: 'r1', outcome: 'internal_error' }
  ])
  t.equal(lines.length, 2)
})

t.test('a line about a session that could not be stored has the cause', async (t) => {
  const proxy = await openProxy(t, 'REDIS_URL')
  const { app, lines } = await buildWithLog(t, { REDIS_URL: proxy.url })
  proxy.strike('session:', { kind: 'reset' })
  t.equal((await client(app).signUp(await signUpBody())).json().data.session, false)
  const [line] = lines.filter(({ msg }) => msg === 'a session could not be stored')
  t.match(line, { err: { message: /^redis is unavailable: ./ } })
})

t.test('an X-Forwarded-For that does not tell the client is logged, at most once a minute each', async (t) => {
  const { app, lines } = await buildWithLog(t, { TRUST_PROXY: '10.0.0.0/8,::ffff:192.0.2.7,2001:db8::/32' })
  async function warningsOf(remoteAddress: string, forwardedFor?: string): Promise<unknown[]> {
    lines.length = 0
    const headers = forwardedFor === undefined ? {} : { 'x-forwarded-for': forwardedFor }
    await app.inject({ url: '/api/v1.0/session', remoteAddress, headers })
    return lines.filter(({ level }) => level === 40).map(({ msg, peer }) => [`${msg}`.slice(0, 33), peer])
  }
  const ignored = 'X-Forwarded-For is ignored: TRUST'
  const chosen = 'every address of X-Forwarded-For '
  t.strictSame(await warningsOf('10.0.0.1', '203.0.113.1'), [])
  t.strictSame(
    await warningsOf('10.0.0.1', '10.0.0.9, 203.0.113.1'),
    [],
    'a client that lies has not chosen its address'
  )
  t.strictSame(await warningsOf('10.0.0.1', '203.0.113.1, 192.0.2.7:443, [2001:db8::7]:443'), [])
  t.strictSame(await warningsOf('10.0.0.1'), [])
  t.strictSame(await warningsOf('198.51.100.1', '203.0.113.1'), [[ignored, '198.51.100.1']])
  t.strictSame(await warningsOf('198.51.100.1', '203.0.113.1'), [], 'once a minute')
  t.strictSame(await warningsOf('::ffff:10.0.0.1', '10.0.0.9, 10.0.0.8:80'), [[chosen, '::ffff:10.0.0.1']])
  t.strictSame(await warningsOf('10.0.0.1', '192.0.2.7'), [], 'once a minute')

  let now = performance.now() + 60_000
  const clock = mock.method(performance, 'now', () => now++)
  t.teardown(() => clock.mock.restore())
  t.strictSame(await warningsOf('10.0.0.1', '[2001:db8::9]:5000'), [[chosen, '10.0.0.1']])
  t.strictSame(await warningsOf('203.0.113.1', '203.0.113.1'), [[ignored, '203.0.113.1']])
})

t.test(
  'of requests that anybody can send without end 100 lines a second are written, and the others counted',
  async (t) => {
    const { app, lines } = await buildWithLog(t)
    let now = performance.now() + 3_600_000
    const clock = mock.method(performance, 'now', () => now)
    t.teardown(() => clock.mock.restore())
    const kinds = {
      no_such_route: '/nowhere',
      bad_request: '/api/v1.0/%zz',
      not_logged_in: '/api/v1.0/session'
    }
    const linesOf = (kind: string) => lines.filter(({ outcome }) => outcome === kind)
    now += 1_000
    for (const url of Object.values(kinds)) for (let n = 0; n < 150; n++) await app.inject(url)
    for (const kind of Object.keys(kinds)) t.equal(linesOf(kind).length, 100, kind)
    for (const { suppressed } of lines) t.equal(suppressed, undefined)
    now += 1_000
    for (const url of Object.values(kinds)) for (let n = 0; n < 2; n++) await app.inject(url)
    for (const kind of Object.keys(kinds)) {
      t.strictSame(
        linesOf(kind)
          .slice(100)
          .map(({ suppressed }) => suppressed),
        [50, undefined],
        kind
      )
    }
    lines.length = 0
    for (let n = 0; n < 150; n++) await client(app).signUp('{}')
    t.equal(linesOf('missing_parameter').length, 150, 'all others are always logged')
  }
)

for (const store of ['REDIS_URL', 'DATABASE_URL'] as const) {
  t.test(
    `while a store is away (${store}), each request has its line, and no other line grows with them`,
    async (t) => {
      const proxy = await openProxy(t, store)
      const { app, lines } = await buildWithLog(t, { [store]: proxy.url })
      await proxy.apply('refuse')
      const requestIds = Array.from({ length: 210 }, (_, n) => `r${n}`)
      const bodies = await Promise.all(requestIds.map(() => signUpBody()))
      const startedAt = performance.now()
      const signUps = (from: number, to: number) =>
        Promise.all(
          requestIds.slice(from, to).map(async (id, n) => {
            const { statusCode } = await client(app).signUp(bodies[from + n], { headers: { 'x-request-id': id } })
            if (statusCode !== 503) throw new Error(`status ${statusCode}`)
          })
        )
      await signUps(0, 10)
      await signUps(10, 210)
      const intervals = 1 + Math.floor((performance.now() - startedAt) / 10_000)
      const requestLines = lines.filter(({ outcome }) => outcome === 'storage_unavailable')
      t.strictSame(new Set(requestLines.map(({ reqId }) => reqId)), new Set(requestIds))
      t.equal(requestLines.length, requestIds.length)
      // The causes differ a little: a connection was closed, or cannot be opened.
      const otherLines = lines.length - requestLines.length
      t.ok(otherLines > 0 && otherLines < 10 * intervals, `${otherLines} other lines`)

      await proxy.heal()
      const body = await signUpBody()
      t.equal((await retried(() => client(app).signUp(body))).statusCode, 201)
      await until('the return of the store is logged', () =>
        lines.some(({ msg }) => /^(Redis|Postgres) answers again$/.test(`${msg}`))
      )
    }
  )
}

t.test('a warning is logged once in ten seconds for each message, and then with the number of those left out', (t) => {
  const written: [unknown, unknown, unknown][] = []
  const write = (line: string) => {
    const { msg, err, suppressed } = JSON.parse(line)
    written.push([msg, err.message, suppressed])
  }
  const warn = sampledWarnings(pino({}, { write }))
  const clock = mock.method(performance, 'now', () => now)
  t.teardown(() => clock.mock.restore())
  let now = 1_000
  const fail = (cause: string) => warn(new Error(cause), 'a failure')
  for (let n = 0; n < 5; n++) fail('away')
  fail('slow')
  warn(new Error('away'), 'another failure')
  now += 9_999
  fail('away')
  now += 1
  fail('away')
  fail('slow')
  now += 10_000
  fail('away')
  t.strictSame(written, [
    ['a failure', 'away', undefined],
    ['a failure', 'slow', undefined],
    ['another failure', 'away', undefined],
    ['a failure', 'away', 5],
    ['a failure', 'slow', undefined],
    ['a failure', 'away', undefined]
  ])

  // However many messages there are, the log is bounded.
  written.length = 0
  for (let n = 0; n < 1_000; n++) fail(`cause ${n}`)
  t.ok(written.length <= 101, `${written.length} lines`)
  t.end()
})
