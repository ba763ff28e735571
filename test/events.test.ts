import { createServer } from 'node:http'
import { text } from 'node:stream/consumers'
import { Webhook } from 'standardwebhooks'
import t, { type Test } from 'tap'
import { signatureHeaders } from '#src/http/webhook.js'
import { client } from '../testkit/client.js'
import { listen } from '../testkit/listen.js'
import { movePerformanceClock } from '../testkit/moved-clock.js'
import { impatient, startTestbed } from '../testkit/testbed.js'
import { until } from '../testkit/until.js'

/** Every committed change of a user is told to the receiver: at least once, in order for a user. */

const { build, buildWithLog, openProxy, postgres, signUpBody } = await startTestbed(t)
t.afterEach(() => postgres.query('DELETE FROM user_events'))

const secret = 'whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw'

interface Received {
  id: string
  type: string
  timestamp: string
  data: { user_id: string; mobile: string; name: string }
}

/** Starts a receiver, which verifies each event, and answers with the status that the test chooses. */
async function startReceiver(t: Test, statusFor: (event: Received) => number | Promise<number> = () => 204) {
  const received: Received[] = []
  const server = createServer(async (request, response) => {
    const body = await text(request)
    const headers = Object.fromEntries(Object.entries(request.headers).map(([name, value]) => [name, `${value}`]))
    new Webhook(secret).verify(body, headers)
    const event: Received = { id: `${headers['webhook-id']}`, ...JSON.parse(body) }
    received.push(event)
    response.writeHead(await statusFor(event)).end()
  })
  const url = await listen(t, server)
  return { received, env: { EVENTS_WEBHOOK_URL: `${url}/events`, EVENTS_WEBHOOK_SECRET: secret } }
}

/** Returns a status of the receiver as a promise, and the function that fulfils it. */
function holdAnswer() {
  let release = (_status: number) => {}
  const held = new Promise<number>((resolve) => {
    release = resolve
  })
  // The promise has called its function already.
  return { held, release }
}

const waiting = async () => (await postgres.query('SELECT * FROM user_events ORDER BY number')).rows
const untilDelivered = () => until('all events are delivered', async () => (await waiting()).length === 0)
/** Lets the next attempts begin now. */
const makeDue = () => postgres.query(`UPDATE user_events SET due_at = now() WHERE due_at < 'infinity'`)

t.test('a sign-up, a reset and a deletion are told to the receiver, signed as Standard Webhooks says', async (t) => {
  const { received, env } = await startReceiver(t)
  const api = client(await build(t, env))
  const body = await signUpBody()
  const { mobile } = body
  const { user_id } = (await api.signUp(body)).json().data
  await api.signUp(body)
  await api.resetPassword(await signUpBody({ mobile }))
  await api.deleteAccount(await signUpBody({ mobile }))
  await untilDelivered()
  t.strictSame(
    received.map(({ type, data }) => ({ type, data })),
    ['user.registered', 'user.password_changed', 'user.deleted'].map((type) => ({
      type,
      data: { user_id, mobile, name: mobile }
    }))
  )
  for (const { id, timestamp } of received) {
    t.match(id, /^[\da-f-]{36}$/)
    t.ok(Math.abs(Date.parse(timestamp) - Date.now()) < 60_000)
  }
})

t.test('the signature is that of the rules of Standard Webhooks, computed in another language', async (t) => {
  t.intercept(Date, 'now', { value: () => 1_614_265_330_500 })
  // The first is the example of the specification. Python: base64.b64encode(hmac.new(key, b'<id>.<seconds>.<body>', 'sha256').digest())
  for (const [key, signature] of [
    [secret, 'v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE='],
    ['密 a secret', 'v1,lE+kdCB00Kk/tzbMO32EknUg1Shx6cxKJv0ZNPU8O9Q=']
  ] as const) {
    const headers = signatureHeaders(key, 'msg_p5jXN8AQM9LWM0D4loKWxJek', '{"test": 2432232314}')
    t.strictSame(headers, {
      'webhook-id': 'msg_p5jXN8AQM9LWM0D4loKWxJek',
      'webhook-timestamp': '1614265330',
      'webhook-signature': signature
    })
  }
})

t.test('nothing is written without EVENTS_WEBHOOK_URL, and for a change that did not happen', async (t) => {
  const { received, env } = await startReceiver(t)
  const silent = client(await build(t))
  const body = await signUpBody()
  t.equal((await silent.signUp(body)).statusCode, 201)
  const api = client(await build(t, env))
  t.equal((await api.signUp(await signUpBody({ mobile: body.mobile }))).statusCode, 409)
  t.equal((await api.resetPassword(await signUpBody())).statusCode, 422)
  t.equal((await api.deleteAccount(await signUpBody())).statusCode, 200)
  t.strictSame([await waiting(), received], [[], []])
})

t.test(
  'a receiver that fails hears of each user in order, with growing pauses, and costs sign-ups nothing',
  async (t) => {
    let isFailing = true
    const { received, env } = await startReceiver(t, () => (isFailing ? 500 : 204))
    const api = client(await build(t, env))
    const body = await signUpBody()
    t.equal((await api.signUp(body)).statusCode, 201)
    t.equal((await api.resetPassword(await signUpBody({ mobile: body.mobile }))).statusCode, 200)
    t.equal((await api.signUp(await signUpBody())).statusCode, 201)
    const pauses: number[] = []
    // The attempts of the instance that has written the events.
    await until('the receiver has failed', () => received.length > 0)
    for (let attempt = 1; attempt <= 4; attempt++) {
      await makeDue()
      await until('the oldest event of each user was tried', async () => {
        const [first, second, third] = await waiting()
        return first.attempts === attempt && second.attempts === 0 && third.attempts === attempt
      })
      const { rows } = await postgres.query(
        'SELECT extract(epoch FROM due_at - now())::float AS s FROM user_events ORDER BY number'
      )
      pauses.push(rows[0].s)
    }
    for (const [n, longest] of [6, 12, 24, 48].entries()) {
      const pause = pauses[n] ?? 0
      t.ok(longest / 2 < pause && pause <= longest, `${pause} s of ${longest} s are left`)
    }
    isFailing = false
    await makeDue()
    await untilDelivered()
    const types = received.filter(({ data }) => data.mobile === body.mobile).map(({ type }) => type)
    t.ok(types.length >= 5)
    t.strictSame([...new Set(types)], ['user.registered', 'user.password_changed'])
    t.equal(
      types.indexOf('user.password_changed'),
      types.length - 1,
      'the later event comes when the earlier one is delivered'
    )
  }
)

t.test('after three days an event is kept and counted, and the later ones of its user are delivered', async (t) => {
  const { received, env } = await startReceiver(t, ({ type }) => (type === 'user.registered' ? 410 : 204))
  const app = await build(t, { ...env, METRICS_PORT: '0' })
  const api = client(app)
  const body = await signUpBody()
  await api.signUp(body)
  await api.resetPassword(await signUpBody({ mobile: body.mobile }))
  await until('the first attempt has failed', () => received.length > 0)
  await postgres.query(`UPDATE user_events SET created_at = created_at - interval '73 hours', due_at = now()`)
  await until('the later event is delivered', async () => (await waiting()).length === 1)
  t.match(received.at(-1), { type: 'user.password_changed' })
  const metrics = await (await fetch(app.metricsUrl ?? '')).text()
  t.match(metrics, 'mobile_signup_events{state="undeliverable"} 1')
  t.match(metrics, 'mobile_signup_events{state="waiting"} 0')
  t.match(metrics, 'mobile_signup_events_oldest_age_seconds 0')
})

t.test('the event of an instance that dies is delivered by another one, and not before that could', async (t) => {
  const { received, env } = await startReceiver(t)
  const dying = await build(t, { EVENTS_WEBHOOK_URL: 'http://127.0.0.1:9' })
  t.equal((await client(dying).signUp(await signUpBody())).statusCode, 201)
  await dying.close()
  const { rows } = await postgres.query('SELECT extract(epoch FROM due_at - created_at)::float AS s FROM user_events')
  t.ok(rows[0].s > 7, 'two seconds until the attempt begins, five until it ends')
  await postgres.query(`UPDATE user_events SET due_at = due_at - interval '${rows[0].s - 2} s'`)
  await build(t, env)
  await untilDelivered()
  t.equal(received.length, 1)
})

t.test('an event that waits for a slow receiver for two seconds is left to the outbox', async (t) => {
  const { held, release } = holdAnswer()
  const attempts: number[] = []
  const { received, env } = await startReceiver(t, async () => {
    if (received.length === 1) return held
    attempts.push((await waiting())[0].attempts)
    return 204
  })
  const { signUp } = client(await build(t, env))
  const { pass } = movePerformanceClock(t)
  await signUp(await signUpBody())
  await until('the receiver is slow', () => received.length === 1)
  await signUp(await signUpBody())
  pass(2_000)
  release(204)
  await until('the first one is delivered', async () => (await waiting()).length === 1)
  await makeDue()
  await untilDelivered()
  t.strictSame(attempts, [1], 'another instance may have delivered it, and the later ones of its user')
})

t.test('instances share the work: each event is sent once if nothing fails', async (t) => {
  const { received, env } = await startReceiver(t)
  const silent = await build(t, { EVENTS_WEBHOOK_URL: 'http://127.0.0.1:9' })
  const bodies = await Promise.all(Array.from({ length: 60 }, () => signUpBody()))
  await Promise.all(bodies.map((body) => client(silent).signUp(body)))
  await silent.close()
  await postgres.query('UPDATE user_events SET due_at = now()')
  await Promise.all([build(t, env), build(t, env), build(t, env)])
  await untilDelivered()
  t.equal(new Set(received.map(({ data }) => data.mobile)).size, 60)
  t.equal(received.length, 60)
})

t.test('the plan of an empty outbox does not hold up the backlog after an outage of the receiver', async (t) => {
  const { received, env } = await startReceiver(t)
  await postgres.query('TRUNCATE user_events')
  await postgres.query('VACUUM ANALYZE user_events')
  await postgres.query('ALTER DATABASE postgres SET plan_cache_mode = force_generic_plan')
  t.teardown(() => postgres.query('ALTER DATABASE postgres RESET ALL'))
  const { app, lines } = await buildWithLog(t, { ...env, ...impatient, PG_POOL_MAX: '1' })
  await client(app).signUp(await signUpBody())
  await untilDelivered()
  await postgres.query(
    `INSERT INTO user_events (user_id, type, mobile, name) SELECT n, 'user.deleted', '', '' FROM generate_series(1, 10000) AS n`
  )
  await until('a hundred are delivered', () => received.length > 100)
  await postgres.query('DELETE FROM user_events')
  t.notMatch(JSON.stringify(lines), 'the outbox of events failed')
})

t.test('an event whose delivery could not be recorded is delivered again', async (t) => {
  const { received, env } = await startReceiver(t)
  const proxy = await openProxy(t, 'DATABASE_URL')
  const app = await build(t, { ...env, DATABASE_URL: proxy.url })
  proxy.strike('DELETE FROM user_events', { kind: 'reset' })
  t.equal((await client(app).signUp(await signUpBody())).statusCode, 201)
  await until('it was received', () => received.length === 1)
  const attempts = (await waiting()).map((event) => event.attempts)
  t.strictSame(attempts, [0], 'the instance that wrote it has not taken it from the outbox')
  await makeDue()
  await untilDelivered()
  t.equal(received.length, 2)
  t.equal(received[0]?.id, received[1]?.id, 'with the same id')
})

t.test('a receiver that fails is asked with one event at a time, and is one line in the log', async (t) => {
  const { held, release } = holdAnswer()
  let isHolding = false
  const { env } = await startReceiver(t, () => (isHolding ? held : 503))
  // Postgres then prefers a plan that runs a subquery again for each row.
  for (const step of ['hashagg', 'hashjoin', 'material', 'mergejoin', 'sort'])
    await postgres.query(`ALTER DATABASE postgres SET enable_${step} = off`)
  t.teardown(() => postgres.query('ALTER DATABASE postgres RESET ALL'))
  const { app, lines } = await buildWithLog(t, env)
  for (let n = 0; n < 5; n++) await client(app).signUp(await signUpBody())
  await until('the receiver has failed', () => lines.some(({ msg }) => msg === 'an event could not be delivered'))
  isHolding = true
  await makeDue()
  await until('an event is taken', async () => (await waiting()).some(({ attempts }) => attempts > 0))
  t.equal((await waiting()).filter(({ attempts }) => attempts > 0).length, 1)
  release(204)
  await untilDelivered()
  const count = (text: string) => lines.filter(({ msg }) => `${msg}`.includes(text)).length
  t.strictSame([count('an event could not be delivered'), count('events are delivered again')], [1, 1])
})
