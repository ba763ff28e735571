import t, { type Test } from 'tap'
import { buildApp } from '../src/app.js'
import type { Environment } from '../src/config/config.js'
import { cookieOf, holdInserts, holdRedisWrites, newMobile, post, signUpBody, testConfig } from './helper.js'

/** An application whose log lines are at hand. */
async function buildWithLog(t: Test, env: Environment = {}) {
  const lines: Record<string, unknown>[] = []
  const app = await buildApp(testConfig(env), { write: (line) => void lines.push(JSON.parse(line)) })
  t.after(() => app.close())
  return { app, lines }
}

t.test('a request is one line at info, with what a gateway’s operator can use', async (t) => {
  const { app, lines } = await buildWithLog(t)
  const body = await signUpBody()
  await post(app, body, { 'x-request-id': 'gateway-7f3a' })
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

t.test('X-Request-Id counts only when it is sane, and stands in every reply', async (t) => {
  const { app, lines } = await buildWithLog(t)
  const insane = ['', ' ', 'a b', 'x'.repeat(129), '{"a":1}', '号', newMobile(), `m=${newMobile()}`]
  for (const id of ['a', 'x'.repeat(128), '4bf92f3577b34da6:00f067aa0ba902b7-01', ...insane]) {
    const reply = await app.inject({ url: '/api/v1.0/session', headers: { 'x-request-id': id } })
    const reqId = lines.at(-1)?.reqId
    t.equal(reply.headers['x-request-id'], reqId)
    if (insane.includes(id)) t.match(reqId, /^[0-9a-f-]{36}$/, `not ${id.slice(0, 20)}`)
    else t.equal(reqId, id)
  }
  for (const url of ['/nowhere', '/health/live', '/api/v1.0/%zz']) {
    const reply = await app.inject({ url, headers: { 'x-request-id': 'gateway-7f3a' } })
    t.equal(reply.headers['x-request-id'], 'gateway-7f3a', url)
  }
})

t.test('G7: nothing of a request that may be secret is logged, and a failing store tells no more', async (t) => {
  const { app, lines } = await buildWithLog(t, { STORE_TIMEOUT_MS: '100', LOG_LEVEL: 'trace' })
  const cookie = cookieOf(await post(app, await signUpBody()))
  const redisDown = await signUpBody()
  const postgresDown = await signUpBody()
  const misplaced = await signUpBody()
  const inUrl = await signUpBody()

  const writes = await holdRedisWrites()
  await post(app, redisDown, { cookie })
  await writes.release()
  const inserts = await holdInserts()
  await post(app, postgresDown, { cookie })
  await inserts.release()
  await post(app, { ...misplaced, mobile: misplaced.password })
  await app.inject({ url: `/api/v1.0/users/${inUrl.mobile}?password=${inUrl.password}`, headers: { cookie } })
  await post(app, `{"password": "${inUrl.password}"`)

  const log = JSON.stringify(lines)
  t.match(log, '"err"', 'the causes are logged')
  for (const body of [redisDown, postgresDown, misplaced, inUrl]) {
    for (const secret of [body.mobile, body.password, body.sms_code]) t.notMatch(log, secret)
  }
  t.notMatch(log, cookie.slice('sid='.length).split('.')[0])
})

t.test('the cause of a refusal is logged once, at error; a wrong code is none', async (t) => {
  const { app, lines } = await buildWithLog(t, { STORE_TIMEOUT_MS: '100' })
  await post(app, { ...(await signUpBody()), sms_code: 'wrong' })
  t.strictSame(
    lines.map(({ level, outcome }) => [level, outcome]),
    [[30, 'wrong_code']]
  )
  const body = await signUpBody()
  const writes = await holdRedisWrites()
  await post(app, body, { 'x-request-id': 'r1' })
  await writes.release()
  t.match(lines.slice(1), [
    { level: 50, reqId: 'r1', err: { message: 'Command timed out' }, msg: 'storage_unavailable' },
    { level: 30, reqId: 'r1', outcome: 'storage_unavailable' }
  ])
})
