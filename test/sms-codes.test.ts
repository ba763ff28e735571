import { createHmac } from 'node:crypto'
import { once } from 'node:events'
import { createServer, type IncomingMessage, type ServerResponse } from 'node:http'
import { type AddressInfo, createServer as createTcpServer } from 'node:net'
import type { FastifyInstance } from 'fastify'
import t, { type Test } from 'tap'
import type { Environment } from '../src/config/config.js'
import { networkOf } from '../src/http/network.js'
import { build, issueCode, logLines, newMobile, post, redis, signUpBody, testConfig, until } from './helper.js'

const secret = 'the secret of the webhook'

interface Received {
  mobile: string
  code: string
  ttl_s: number
  id: string
}

/** A real SMS gateway on loopback, which answers as it is told, at first 200. */
async function openWebhook(t: Test) {
  const received: (Received & { signature: string | undefined; body: string })[] = []
  const webhook = {
    received,
    url: '',
    answer: (_request: IncomingMessage, response: ServerResponse): void => {
      response.end('{}')
    }
  }
  const server = createServer(async (request, response) => {
    let body = ''
    for await (const chunk of request) body += chunk
    received.push({ ...JSON.parse(body), body, signature: request.headers['x-signature'] })
    webhook.answer(request, response)
  })
  await once(server.listen(0, '127.0.0.1'), 'listening')
  t.teardown(() => {
    server.closeAllConnections()
    server.close()
  })
  webhook.url = `http://127.0.0.1:${(server.address() as AddressInfo).port}/sms`
  return webhook
}

/** No limit but what a test sets. */
const unlimited = { SMS_RESEND_S: '0', SMS_DAILY_MAX: '0', SMS_IP_HOURLY_MAX: '0', SMS_PREFIX_HOURLY_MAX: '0' }

const send = (app: FastifyInstance, mobile: string, from = '127.0.0.1', headers = {}) =>
  app.inject({ method: 'POST', url: '/api/v1.0/sms_codes', payload: { mobile }, remoteAddress: from, headers })

async function buildWithWebhook(t: Test, env: Environment = {}) {
  const webhook = await openWebhook(t)
  const app = await build(t, { SMS_WEBHOOK_URL: webhook.url, SMS_WEBHOOK_SECRET: secret, ...unlimited, ...env })
  return { app, webhook }
}

t.test('202: a code of six digits for SMS_CODE_TTL_S, posted to the webhook with a signature', async (t) => {
  const { app, webhook } = await buildWithWebhook(t, { SMS_CODE_TTL_S: '120' })
  const mobile = newMobile()
  const reply = await send(app, mobile)
  t.strictSame([reply.statusCode, reply.json()], [202, { errno: '0', errmsg: '发送成功' }])
  const [message] = webhook.received
  t.equal(webhook.received.length, 1)
  t.match(message, { mobile, code: /^\d{6}$/, ttl_s: 120, id: /^[0-9a-f-]{36}$/ })
  t.equal(await redis.get(`sms_code_${mobile}`), message?.code)
  const life = await redis.ttl(`sms_code_${mobile}`)
  t.ok(life > 110 && life <= 120)
  const [, seconds, mac] = /^t=(\d+),v1=([0-9a-f]{64})$/.exec(message?.signature ?? '') ?? []
  t.equal(mac, createHmac('sha256', secret).update(`${seconds}.${message?.body}`).digest('hex'))
  t.ok(Math.abs(Number(seconds) - Date.now() / 1_000) < 5)

  const body = await signUpBody({ mobile })
  await redis.set(`sms_code_${mobile}`, `${message?.code}`)
  t.equal((await post(app, { ...body, sms_code: message?.code })).statusCode, 201)
  const registered = await send(app, mobile)
  t.strictSame([registered.statusCode, registered.json()], [202, reply.json()], 'the same for a registered mobile')
})

t.test('400: a mobile that is none; 404 under SMS=off', async (t) => {
  const { app, webhook } = await buildWithWebhook(t)
  for (const mobile of ['', '12900001111', 13900001111]) {
    const reply = await app.inject({ method: 'POST', url: '/api/v1.0/sms_codes', payload: { mobile } })
    t.strictSame([reply.statusCode, reply.json().errno], [400, '4103'])
  }
  t.equal(webhook.received.length, 0)
  t.equal((await send(await build(t, { SMS: 'off' }), newMobile())).statusCode, 404)
})

t.test('a resend replaces the code and its guesses', async (t) => {
  const { app, webhook } = await buildWithWebhook(t, { SMS_CODE_ATTEMPTS: '2' })
  const mobile = newMobile()
  const body = await signUpBody({ mobile })
  await send(app, mobile)
  t.equal((await post(app, { ...body, sms_code: 'wrong' })).statusCode, 422)
  await send(app, mobile)
  t.equal((await post(app, { ...body, sms_code: 'wrong' })).statusCode, 422)
  t.equal((await post(app, { ...body, sms_code: webhook.received[1]?.code })).statusCode, 201)
})

t.test('one in SMS_RESEND_S: 429 4201 with the exact Retry-After, and nothing is sent', async (t) => {
  const { app, webhook } = await buildWithWebhook(t, { SMS_RESEND_S: '60' })
  const mobile = newMobile()
  await send(app, mobile)
  t.equal(await redis.ttl(`send_sms_code_${mobile}`), 60)
  await redis.pexpire(`send_sms_code_${mobile}`, 41_500)
  const reply = await send(app, mobile)
  t.strictSame([reply.statusCode, reply.json()], [429, { errno: '4201', errmsg: '请求过于频繁，请稍后重试' }])
  t.equal(reply.headers['retry-after'], '42')
  t.equal(webhook.received.length, 1)
  t.equal(await redis.get(`sms_code_${mobile}`), webhook.received[0]?.code, 'and the code stays')
})

t.test('a throttle that another service has set holds, whatever its value', async (t) => {
  const { app } = await buildWithWebhook(t, { SMS_RESEND_S: '60' })
  const mobile = newMobile()
  await redis.set(`send_sms_code_${mobile}`, 'sent', 'EX', 30)
  t.equal((await send(app, mobile)).headers['retry-after'], '30')
})

t.test('of 100 simultaneous requests, on two instances, exactly as many are sent as each limit allows', async (t) => {
  const one = newMobile()
  const many = () => `139${Math.random().toString().slice(2, 10).padEnd(8, '0')}`
  const limits: [string, Environment, number, (n: number) => string][] = [
    ['one in SMS_RESEND_S', { SMS_RESEND_S: '60' }, 1, () => one],
    ['SMS_DAILY_MAX', { SMS_DAILY_MAX: '10' }, 10, () => one],
    ['SMS_IP_HOURLY_MAX', { SMS_IP_HOURLY_MAX: '20' }, 20, many],
    ['SMS_PREFIX_HOURLY_MAX', { SMS_PREFIX_HOURLY_MAX: '30' }, 30, (n) => `1500000${1_000 + n}`],
    ['SMS_HOURLY_MAX', { SMS_HOURLY_MAX: '40' }, 40, many],
    [
      'all of them',
      { SMS_RESEND_S: '60', SMS_IP_HOURLY_MAX: '20', SMS_HOURLY_MAX: '30' },
      20,
      (n) => `1510000${1_000 + (n % 25)}`
    ]
  ]
  for (const [name, env, allowed, mobileOf] of limits) {
    await redis.flushall()
    const { app, webhook } = await buildWithWebhook(t, env)
    const other = await build(t, { SMS_WEBHOOK_URL: webhook.url, ...unlimited, ...env })
    const replies = await Promise.all(Array.from({ length: 100 }, (_, n) => send(n % 2 ? app : other, mobileOf(n))))
    const sent = replies.filter(({ statusCode }) => statusCode === 202).length
    t.strictSame([sent, webhook.received.length], [allowed, allowed], name)
    for (const { statusCode, headers } of replies) {
      if (statusCode !== 202) t.match([statusCode, headers['retry-after']], [429, /^[1-9]\d*$/])
    }
  }
  await redis.flushall()
})

t.test('addresses are those that TRUST_PROXY tells, and of IPv6 a network of 64 bits', async (t) => {
  t.equal(networkOf('192.0.2.1'), '192.0.2.1')
  t.equal(networkOf('::ffff:192.0.2.1'), '192.0.2.1')
  t.equal(networkOf('2001:db8:1:2:3:4:5:6'), '2001:db8:1:2::/64')
  t.equal(networkOf('192.0.2.1:5678'), '192.0.2.1')
  t.equal(networkOf('[2001:db8:1:2::1]:5678'), '2001:db8:1:2::/64')
  for (const none of ['unknown', '', '_hidden', undefined]) t.equal(networkOf(none), 'unknown')
  const { app } = await buildWithWebhook(t, { SMS_IP_HOURLY_MAX: '1', TRUST_PROXY: '10.0.0.0/8' })
  const through = (address: string) => ({ 'x-forwarded-for': address })
  const statuses = [
    await send(app, newMobile(), '2001:db8::1'),
    await send(app, newMobile(), '2001:db8::2'),
    await send(app, newMobile(), '2001:db8:0:1::1'),
    await send(app, newMobile(), '10.0.0.1', through('192.0.2.1')),
    await send(app, newMobile(), '10.0.0.1', through('192.0.2.2')),
    await send(app, newMobile(), '10.0.0.2', through('192.0.2.1')),
    await send(app, newMobile(), '198.51.100.1', through('192.0.2.3')),
    await send(app, newMobile(), '198.51.100.1', through('192.0.2.4'))
  ].map(({ statusCode }) => statusCode)
  t.strictSame(statuses, [202, 429, 202, 202, 202, 429, 202, 429])
})

t.test('a gateway that fails: 503 4301; the code before it and the throttles are as they were', async (t) => {
  const closed = createTcpServer().listen(0, '127.0.0.1')
  await once(closed, 'listening')
  const nobody = `http://127.0.0.1:${(closed.address() as AddressInfo).port}/`
  closed.close()
  const ways: Record<
    string,
    { answer?: (request: IncomingMessage, response: ServerResponse) => void; asked: number; env?: Environment }
  > = {
    'an error': { answer: (_, response) => response.writeHead(500).end('no'), asked: 1 },
    'a refusal': { answer: (_, response) => response.writeHead(400).end(), asked: 1 },
    'a redirection': { answer: (_, response) => response.writeHead(302, { location: '/' }).end(), asked: 1 },
    'a connection that ends': { answer: ({ socket }) => socket.destroy(), asked: 2 },
    'an answer that is no HTTP': { answer: ({ socket }) => socket.end('SMTP 220 hello\r\n\r\n'), asked: 1 },
    'no answer': { answer: () => undefined, asked: 1 },
    'an answer that stops in its head': { answer: ({ socket }) => socket.write('HTTP/1.1 200'), asked: 1 },
    'nobody there': { asked: 0, env: { SMS_WEBHOOK_URL: nobody } }
  }
  await Promise.all(
    Object.entries(ways).map(async ([way, { answer, asked, env }]) => {
      const { app, webhook } = await buildWithWebhook(t, { SMS_RESEND_S: '60', SMS_DAILY_MAX: '1', ...env })
      if (answer) webhook.answer = answer
      const mobile = newMobile()
      const former = await issueCode(mobile)
      await redis.pexpire(`sms_code_${mobile}`, 100_000)
      const startedAt = Date.now()
      const reply = await send(app, mobile)
      t.ok(Date.now() - startedAt < 7_000, `${way}: bounded`)
      t.strictSame([reply.statusCode, reply.json()], [503, { errno: '4301', errmsg: '第三方系统错误' }], way)
      t.match(reply.headers['retry-after'], /^[1-9]\d*$/)
      t.equal(webhook.received.length, asked, `${way}: asked ${asked} times`)
      t.equal(new Set(webhook.received.map(({ id }) => id)).size, Math.min(asked, 1), `${way}: with one id`)
      t.equal(await redis.get(`sms_code_${mobile}`), former, way)
      const life = await redis.pttl(`sms_code_${mobile}`)
      t.ok(life > 80_000 && life <= 100_000, `${way}: with its life`)
      t.equal(await redis.exists(`send_sms_code_${mobile}`), 0, way)
      if (env) return
      webhook.answer = (_, response) => response.end()
      t.equal((await send(app, mobile)).statusCode, 202, `${way}: at once again`)
    })
  )
})

t.test('a connection that fails is tried once more with the same id, and then it is sent', async (t) => {
  const { app, webhook } = await buildWithWebhook(t)
  webhook.answer = ({ socket }) => {
    webhook.answer = (_, response) => response.end()
    socket.destroy()
  }
  t.equal((await send(app, newMobile())).statusCode, 202)
  t.equal(webhook.received.length, 2)
  t.equal(webhook.received[0]?.id, webhook.received[1]?.id)
})

t.test('a gateway that keeps failing is left alone: 503 at once', async (t) => {
  const { app, webhook } = await buildWithWebhook(t)
  webhook.answer = (_, response) => response.writeHead(500).end()
  for (let n = 0; n < 8; n++) t.equal((await send(app, newMobile())).json().errno, '4301')
  t.equal(webhook.received.length, 5)

  // When it is tried again, one message is on its way and the others hear at once.
  const held: ServerResponse[] = []
  webhook.answer = (_, response) => held.push(response)
  let first: ReturnType<typeof send> | undefined
  await until(async () => {
    const sending = send(app, newMobile())
    await Promise.race([sending, until(async () => held.length > 0)])
    if (held.length > 0) first = sending
    return held.length > 0
  })
  t.equal((await send(app, newMobile())).json().errno, '4301')
  t.equal(held.length, 1)
  webhook.answer = (_, response) => response.end()
  held[0]?.end()
  t.equal((await first)?.statusCode, 202)
  t.equal((await send(app, newMobile())).statusCode, 202, 'and it is used again')
})

t.test('a gateway that refuses one number is not shut for the others', async (t) => {
  const { app, webhook } = await buildWithWebhook(t)
  webhook.answer = (_, response) => response.writeHead(422).end()
  for (let n = 0; n < 8; n++) t.equal((await send(app, newMobile())).json().errno, '4301')
  t.equal(webhook.received.length, 8)
  webhook.answer = (_, response) => response.end()
  t.equal((await send(app, newMobile())).statusCode, 202)
})

t.test('six digits of every code are uniform', async (t) => {
  const app = await build(t, { ...unlimited })
  const counts = Array.from({ length: 6 }, () => Array.from({ length: 10 }, () => 0))
  const rounds = 5_000
  const mobile = newMobile()
  for (let n = 0; n < rounds; n++) {
    await send(app, mobile)
    for (const [place, digit] of [...((await redis.get(`sms_code_${mobile}`)) ?? '')].entries()) {
      const places = counts[place]
      if (places !== undefined) places[Number(digit)] = (places[Number(digit)] ?? 0) + 1
    }
  }
  // Six standard deviations: one run in eight million fails by chance.
  const bound = 6 * Math.sqrt(rounds * 0.1 * 0.9)
  for (const place of counts) for (const count of place) t.ok(Math.abs(count - rounds / 10) < bound)
})

t.test('the log sender shows the code where the service brings its own stores, and nowhere else', async (t) => {
  for (const embedded of [true, false]) {
    const app = await build(t, {}, { ...testConfig(unlimited), embedded })
    const mobile = newMobile()
    const before = logLines().length
    t.equal((await send(app, mobile)).statusCode, 202)
    const code = await redis.get(`sms_code_${mobile}`)
    t.equal(logLines().slice(before).includes(`${code}`), embedded)
  }
})
