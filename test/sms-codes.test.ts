import { createHmac } from 'node:crypto'
import type { ServerResponse } from 'node:http'
import t, { type Test } from 'tap'
import type { Environment } from '#src/config/config.js'
import { freePort } from '../dev/embedded-stores.js'
import { client, type Reply, statusAndErrno } from '../testkit/client.js'
import { type Answer, accept, answerWith, startWebhook, unlimitedSms } from '../testkit/sms-webhook.js'
import { startTestbed } from '../testkit/testbed.js'
import { until } from '../testkit/until.js'

const { build, redis, newMobile, issueCode, openProxy, signUpBody, log } = await startTestbed(t)

const webhookSecret = 'the secret of the webhook'

async function buildWithWebhook(t: Test, env: Environment = {}) {
  const webhook = await startWebhook(t)
  const app = await build(t, {
    SMS_WEBHOOK_URL: webhook.url,
    SMS_WEBHOOK_SECRET: webhookSecret,
    ...unlimitedSms,
    ...env
  })
  return { app, webhook }
}

/**
 * Sends a request that a rate limit refuses, and checks that its Retry-After is the TTL of the limit's key, rounded up. The
 * TTL is read before and after the request, because it runs.
 *
 * @param longest if the request itself starts the limit: its seconds
 */
async function checkRetryAfter(t: Test, key: string, send: () => Promise<Reply>, longest = 0): Promise<Reply> {
  longest ||= Math.ceil((await redis.pttl(key)) / 1_000)
  const reply = await send()
  const shortest = Math.ceil((await redis.pttl(key)) / 1_000)
  const seconds = Number(reply.headers['retry-after'])
  t.ok(shortest > 0 && shortest <= seconds && seconds <= longest, `${shortest} <= ${seconds} <= ${longest}`)
  return reply
}

t.test('a code has six digits, lives for SMS_CODE_TTL_S and reaches the webhook with a signature', async (t) => {
  const { app, webhook } = await buildWithWebhook(t, { SMS_CODE_TTL_S: '120' })
  const body = await signUpBody()
  const { mobile } = body
  const sentAfter = Math.floor(Date.now() / 1_000)
  const reply = await client(app).sendCode(mobile)
  const sentBefore = Math.floor(Date.now() / 1_000)
  const { ticket } = reply.json().data
  t.strictSame([reply.statusCode, reply.json()], [202, { errno: '0', errmsg: '发送成功', data: { ticket } }])
  t.match(ticket, /^[\w-]{12}\.[0-9a-z]+\.[\w-]{43}$/)
  const [message] = webhook.received
  t.equal(webhook.received.length, 1)
  t.match(message, { mobile, code: /^\d{6}$/, ttl_s: 120, id: /^[0-9a-f-]{36}$/ })
  t.equal(await redis.get(`sms_code_${mobile}`), message?.code)
  const ttl = await redis.ttl(`sms_code_${mobile}`)
  t.ok(ttl > 60 && ttl <= 120, `TTL ${ttl}`)
  const [, seconds, mac] = /^t=(\d+),v1=([0-9a-f]{64})$/.exec(`${message?.signature}`) ?? []
  t.equal(mac, createHmac('sha256', webhookSecret).update(`${seconds}.${message?.body}`).digest('hex'))
  t.ok(Number(seconds) >= sentAfter && Number(seconds) <= sentBefore)

  t.equal((await client(app).signUp({ ...body, sms_code: message?.code })).statusCode, 201)
  const registered = await client(app).sendCode(mobile)
  const { ticket: otherTicket } = registered.json().data
  const sameReply = { ...reply.json(), data: { ticket: otherTicket } }
  t.strictSame([registered.statusCode, registered.json()], [202, sameReply], 'the same for a registered mobile')
})

t.test('an invalid mobile is refused with 400, and SMS=off has no route', async (t) => {
  const { app, webhook } = await buildWithWebhook(t)
  for (const mobile of ['', '12900001111', 13900001111]) {
    t.strictSame(statusAndErrno(await client(app).sendCode(mobile)), [400, '4103'])
  }
  t.equal(webhook.received.length, 0)
  t.equal((await client(await build(t, { SMS: 'off' })).sendCode(newMobile())).statusCode, 404)
})

t.test('a resend sends the same code while half of its life is left, whatever its purpose', async (t) => {
  const { app, webhook } = await buildWithWebhook(t, { SMS_CODE_TTL_S: '300' })
  const mobile = newMobile()
  const key = `sms_code_${mobile}`
  /** Asks for a code, and returns the message with it. */
  async function send(purpose?: string) {
    t.equal((await client(app).sendCode(mobile, { purpose })).statusCode, 202)
    const message = webhook.received.at(-1)
    t.equal(await redis.get(key), message?.code)
    return message
  }
  const first = await send()
  await redis.pexpire(key, 200_000)
  const second = await send()
  t.equal(second?.code, first?.code)
  t.not(second?.id, first?.id)
  t.ok(second && second.ttl_s > 170 && second.ttl_s <= 200, 'the message tells the remaining life')
  t.ok((await redis.pttl(key)) <= 200_000, 'a resend does not extend the life')

  t.equal((await send('sign_up'))?.code, first?.code)
  await redis.pexpire(key, 149_000)
  // A new code is the same as the old one once in a million times.
  t.not((await send('sign_up'))?.code, first?.code, 'less than half of the life')
  t.ok((await redis.pttl(key)) > 200_000)
  const foreignCode = await issueCode(mobile)
  t.not((await send('sign_up'))?.code, foreignCode, 'a code of another service')
})

t.test('a resend within SMS_RESEND_S is 429 4201 with the exact Retry-After, and sends nothing', async (t) => {
  const { app, webhook } = await buildWithWebhook(t, { SMS_RESEND_S: '60' })
  const mobile = newMobile()
  const key = `send_sms_code_${mobile}`
  await client(app).sendCode(mobile)
  const ttl = await redis.ttl(key)
  t.ok(ttl > 40 && ttl <= 60, `TTL ${ttl}`)
  await redis.pexpire(key, 41_500)
  const reply = await checkRetryAfter(t, key, () => client(app).sendCode(mobile))
  t.strictSame([reply.statusCode, reply.json()], [429, { errno: '4201', errmsg: '请求过于频繁，请稍后重试' }])
  t.equal(webhook.received.length, 1)
  t.equal(await redis.get(`sms_code_${mobile}`), webhook.received[0]?.code, 'the code stays')
})

t.test('a code serves what a refused request has asked for, and that sends nothing and adds no time', async (t) => {
  const limits = { SMS_RESEND_S: '60', SMS_DAILY_MAX: '2', SMS_IP_HOURLY_MAX: '2' }
  for (const refusedBy of ['SMS_RESEND_S', 'SMS_DAILY_MAX', 'SMS_IP_HOURLY_MAX'] as const) {
    const { app, webhook } = await buildWithWebhook(t, { [refusedBy]: limits[refusedBy] })
    const api = client(app)
    const body = await signUpBody()
    await redis.del(`sms_code_${body.mobile}`)
    const from = '198.51.100.9'
    await redis.del(`sms_codes:network:${from}`)
    // A stranger asks for the other purpose, as often as the limit allows, and the owner is refused.
    const sends = refusedBy === 'SMS_RESEND_S' ? 1 : 2
    for (let n = 0; n < sends; n++) {
      t.equal((await api.sendCode(body.mobile, { purpose: 'password', from })).statusCode, 202)
    }
    const [code, keys] = [await redis.get(`sms_code_${body.mobile}`), (await redis.keys(`*${body.mobile}*`)).sort()]
    await redis.pexpire(`sms_code_${body.mobile}`, 200_000)
    t.equal((await api.sendCode(body.mobile, { purpose: 'sign_up', from })).statusCode, 429)
    t.equal(webhook.received.length, sends)
    t.equal(await redis.get(`sms_code_${body.mobile}`), code)
    t.ok((await redis.pttl(`sms_code_${body.mobile}`)) <= 200_000)
    t.strictSame((await redis.keys(`*${body.mobile}*`)).sort(), keys)
    t.equal((await api.signUp({ ...body, sms_code: code })).statusCode, 201, refusedBy)

    if (refusedBy !== 'SMS_RESEND_S') continue
    const unknown = newMobile()
    await redis.set(`send_sms_code_${unknown}`, '', 'EX', 60)
    await api.sendCode(unknown, { purpose: 'sign_up', from })
    t.equal(await redis.exists(`sms_code_${unknown}`, `{sms_code_${unknown}}:issue`), 0, 'it makes no code')
  }
})

t.test('a resend limit that another service has set counts, whatever its value', async (t) => {
  const { app } = await buildWithWebhook(t, { SMS_RESEND_S: '60' })
  const mobile = newMobile()
  const key = `send_sms_code_${mobile}`
  await redis.set(key, 'sent', 'EX', 30)
  const reply = await checkRetryAfter(t, key, () => client(app).sendCode(mobile))
  t.equal(reply.statusCode, 429)
})

t.test('100 parallel requests on two instances send exactly as many codes as each limit allows', async (t) => {
  const sameMobile = newMobile()
  const sameAddress = () => '203.0.113.1'
  const otherAddress = (index: number) => `198.18.0.${index}`
  const limits = { SMS_DAILY_MAX: '10', SMS_IP_HOURLY_MAX: '20', SMS_PREFIX_HOURLY_MAX: '30', SMS_HOURLY_MAX: '40' }
  await checkAllowed(limits, {
    SMS_DAILY_MAX: { allowed: 10, mobileOf: () => sameMobile, addressOf: sameAddress },
    SMS_IP_HOURLY_MAX: { allowed: 20, mobileOf: newMobile, addressOf: () => '203.0.113.2' },
    SMS_PREFIX_HOURLY_MAX: { allowed: 30, mobileOf: (index) => `1500000${1_000 + index}`, addressOf: otherAddress },
    SMS_HOURLY_MAX: { allowed: 40, mobileOf: newMobile, addressOf: otherAddress }
  })
  await checkAllowed(
    { SMS_RESEND_S: '60', SMS_IP_HOURLY_MAX: '20', SMS_HOURLY_MAX: '30' },
    {
      SMS_RESEND_S: { allowed: 1, mobileOf: () => sameMobile, addressOf: otherAddress },
      'all of them': { allowed: 20, mobileOf: (index) => `1510000${1_000 + (index % 25)}`, addressOf: sameAddress }
    }
  )

  async function checkAllowed(
    env: Environment,
    cases: Record<
      string,
      { allowed: number; mobileOf: (index: number) => string; addressOf: (index: number) => string }
    >
  ) {
    const { app, webhook } = await buildWithWebhook(t, env)
    const otherApp = await build(t, { SMS_WEBHOOK_URL: webhook.url, ...unlimitedSms, ...env })
    for (const [name, { allowed, mobileOf, addressOf }] of Object.entries(cases)) {
      await redis.flushall()
      const earlierCount = webhook.received.length
      const replies = await Promise.all(
        Array.from({ length: 100 }, (_, index) =>
          client(index % 2 ? app : otherApp).sendCode(mobileOf(index), { from: addressOf(index) })
        )
      )
      const acceptedCount = replies.filter(({ statusCode }) => statusCode === 202).length
      const sentCount = webhook.received.length - earlierCount
      t.strictSame([acceptedCount, sentCount], [allowed, allowed], name)
      for (const { statusCode, headers } of replies) {
        if (statusCode !== 202) t.match([statusCode, `${headers['retry-after']}`], [429, /^[1-9]\d*$/])
      }
    }
  }
})

t.test('limits count the client address behind TRUST_PROXY, an IPv6 /64 once and a /48 64 times', async (t) => {
  const { app } = await buildWithWebhook(t, { SMS_IP_HOURLY_MAX: '1', TRUST_PROXY: '10.0.0.0/8' })
  const statusOf = async (from: string, forwardedFor?: string) => {
    const headers = forwardedFor === undefined ? {} : { 'x-forwarded-for': forwardedFor }
    return (await client(app).sendCode(newMobile(), { from, headers })).statusCode
  }
  t.equal(await statusOf('2001:db8::1'), 202)
  t.equal(await statusOf('2001:db8::2'), 429, 'the same /64')
  for (let n = 1; n < 64; n++) t.equal(await statusOf(`2001:db8:0:${n}::1`), 202, 'another /64')
  t.equal(await statusOf('2001:db8:0:64::1'), 429, 'the 65th /64 of a /48')
  t.equal(await statusOf('2001:db8:1:1::1'), 202, 'another /48')
  t.equal(await statusOf('10.0.0.1', '192.0.2.1'), 202)
  t.equal(await statusOf('10.0.0.1', '192.0.2.2'), 202)
  t.equal(await statusOf('10.0.0.2', '192.0.2.1'), 429, 'the same client behind another trusted proxy')
  t.equal(await statusOf('10.0.0.2', '198.18.0.1, 10.0.0.6:443'), 202)
  t.equal(
    await statusOf('::ffff:10.0.0.1', '198.18.0.2:5000,[::ffff:10.0.0.6]:443'),
    202,
    'a hop with a port is no client'
  )
  t.equal(await statusOf('10.0.0.2', '198.18.0.1:1234, 10.0.0.7:443, 10.0.0.6'), 429, 'the port of a client is none')
  t.equal(await statusOf('198.51.100.1', '192.0.2.3'), 202)
  t.equal(await statusOf('198.51.100.1', '192.0.2.4'), 429, 'a header of an untrusted address does not count')
})

// They wait for fixed times of the service, so they run in parallel.
t.test('a gateway that fails', async (t) => {
  t.jobs = 2
  const limits = { ...unlimitedSms, SMS_RESEND_S: '60', SMS_DAILY_MAX: '2', SMS_IP_HOURLY_MAX: '20' }

  t.test('a message that was certainly not sent: its code is withdrawn, and the mobile may ask again', async (t) => {
    const webhook = await startWebhook(t)
    const noListener = `http://127.0.0.1:${await freePort()}/`
    for (const [name, url, answer, requests] of [
      ['status 400', webhook.url, answerWith(400), 1],
      ['status 429', webhook.url, answerWith(429), 1],
      ['no listener', noListener, accept, 0]
    ] as const) {
      webhook.answer = answer
      const app = await build(t, { ...limits, SMS_WEBHOOK_URL: url })
      const mobile = newMobile()
      const from = `198.51.100.${requests}`
      await issueCode(mobile)
      await redis.del(`sms_codes:network:${from}`)
      const earlierCount = webhook.received.length
      const reply = await client(app).sendCode(mobile, { from })
      t.strictSame([reply.statusCode, reply.json()], [503, { errno: '4301', errmsg: '第三方系统错误' }], name)
      t.match(`${reply.headers['retry-after']}`, /^[1-9]$/)
      t.equal(webhook.received.length - earlierCount, requests, `${name}: ${requests} requests`)
      t.equal(await redis.exists(`sms_code_${mobile}`), 0, `${name}: neither it nor the former one is left`)
      t.equal(await redis.exists(`send_sms_code_${mobile}`, `sms_codes:mobile:${mobile}`), 0, `${name}: its limits`)
      t.equal(await redis.zcard(`sms_codes:network:${from}`), 1, `${name}: the limit of the address stays`)
    }
  })

  t.test('a message that may have been delivered: its code stays valid, and nothing is given back', async (t) => {
    const webhook = await startWebhook(t)
    // Two services, because five failures open the circuit breaker.
    const services = await Promise.all([1, 2].map(() => build(t, { ...limits, SMS_WEBHOOK_URL: webhook.url })))
    const failures: { name: string; requests: number; answer: Answer }[] = [
      { name: 'status 500', requests: 1, answer: (_, response) => response.writeHead(500).end('no') },
      { name: 'a closed connection', requests: 2, answer: ({ socket }) => socket.destroy() },
      { name: 'no answer', requests: 1, answer: () => undefined },
      { name: 'a redirect', requests: 1, answer: (_, response) => response.writeHead(302, { location: '/' }).end() },
      { name: 'not HTTP', requests: 1, answer: ({ socket }) => socket.end('SMTP 220 hello\r\n\r\n') },
      { name: 'half an answer', requests: 1, answer: ({ socket }) => socket.write('HTTP/1.1 200') }
    ]
    const answers = new Map<string, Answer>()
    webhook.answer = (request, response, message) => (answers.get(message.mobile) ?? accept)(request, response, message)

    const checks = failures.map(async ({ name, requests, answer }, index) => {
      const api = client(services[index % 2] ?? '')
      const body = await signUpBody()
      const { mobile } = body
      answers.set(mobile, answer)
      const startedAt = Date.now()
      const reply = await checkRetryAfter(t, `send_sms_code_${mobile}`, () => api.sendCode(mobile), 60)
      // The service waits for 5 s. The rest is for a busy machine: fetch itself waits for 300 s.
      t.ok(Date.now() - startedAt < 30_000, `${name}: the wait is bounded`)
      t.strictSame([reply.statusCode, reply.json()], [503, { errno: '4301', errmsg: '第三方系统错误' }], name)
      const received = webhook.received.filter((message) => message.mobile === mobile)
      t.equal(received.length, requests, `${name}: ${requests} requests`)
      t.equal(new Set(received.map(({ id }) => id)).size, 1, `${name}: one message id`)
      t.equal((await api.sendCode(mobile)).statusCode, 429, `${name}: not again before that`)
      t.equal(await redis.zcard(`sms_codes:mobile:${mobile}`), 1, `${name}: the daily limit counts it`)
      t.equal((await api.signUp({ ...body, sms_code: received[0]?.code })).statusCode, 201, `${name}: the code works`)
    })
    await Promise.all(checks)
  })

  t.test('after a refused message, Retry-After is that of the limit of the address, if it is exhausted', async (t) => {
    const { app, webhook } = await buildWithWebhook(t, { SMS_IP_HOURLY_MAX: '1' })
    webhook.answer = answerWith(400)
    const from = '198.51.100.77'
    await checkRetryAfter(t, `sms_codes:network:${from}`, () => client(app).sendCode(newMobile(), { from }), 3_600)
  })

  t.test('after the last message of a day, Retry-After is the end of the day', async (t) => {
    const { app, webhook } = await buildWithWebhook(t, { SMS_DAILY_MAX: '1' })
    webhook.answer = answerWith(500)
    const mobile = newMobile()
    await checkRetryAfter(t, `sms_codes:mobile:${mobile}`, () => client(app).sendCode(mobile), 86_400)
  })

  t.test('while five mobiles and half of all fail, nothing is sent and nothing is consumed', async (t) => {
    const { app, webhook } = await buildWithWebhook(t, { SMS_RESEND_S: '60' })
    const send = (mobile: string) => client(app).sendCode(mobile)
    webhook.answer = answerWith(500)
    for (let n = 0; n < 5; n++) t.equal((await send(newMobile())).json().errno, '4301')
    const mobile = newMobile()
    const reply = await send(mobile)
    t.strictSame([reply.statusCode, reply.json().errno], [503, '4301'])
    t.match(`${reply.headers['retry-after']}`, /^[1-5]$/)
    t.equal(webhook.received.length, 5)
    t.equal(await redis.exists(`send_sms_code_${mobile}`, `sms_code_${mobile}`), 0)
    webhook.answer = accept
    await until('the gateway gets messages again', async () => (await send(newMobile())).statusCode === 202)
  })

  t.test('one mobile cannot stop the messages to others', async (t) => {
    const { app, webhook } = await buildWithWebhook(t)
    const failing = newMobile()
    webhook.answer = (request, response, message) =>
      (message.mobile === failing ? answerWith(502) : accept)(request, response, message)
    for (let n = 0; n < 10; n++) {
      for (let repeat = 0; repeat < 3; repeat++) t.equal((await client(app).sendCode(failing)).statusCode, 503)
      t.equal((await client(app).sendCode(newMobile())).statusCode, 202)
    }
  })
})

t.test('a failed message does not withdraw a code that another message has delivered', async (t) => {
  const { app, webhook } = await buildWithWebhook(t)
  const mobile = newMobile()
  const firstResponse = new Promise<ServerResponse>((resolve) => {
    webhook.answer = (_, response) => resolve(response)
  })
  const first = client(app).sendCode(mobile)
  const response = await firstResponse
  webhook.answer = accept
  t.equal((await client(app).sendCode(mobile)).statusCode, 202)
  response.writeHead(400).end()
  t.equal((await first).statusCode, 503)
  t.equal(await redis.get(`sms_code_${mobile}`), webhook.received[1]?.code)
})

t.test('a code that completes a sign-up or a reset gives its units back', async (t) => {
  const { app, webhook } = await buildWithWebhook(t, { SMS_IP_HOURLY_MAX: '2', SMS_HOURLY_MAX: '2' })
  const api = client(app)
  const from = '203.0.113.77'
  const counters = ['sms_codes:all', `sms_codes:network:${from}`]
  await redis.del(counters)
  /** Asks for a code, and returns a body with it. */
  async function receiveCode(mobile = newMobile()) {
    const reply = await api.sendCode(mobile, { from })
    return { reply, body: await signUpBodyWith(mobile, `${webhook.received.at(-1)?.code}`) }
  }
  const signUpBodyWith = async (mobile: string, code: string) => {
    const body = await signUpBody({ mobile })
    await redis.set(`sms_code_${mobile}`, code, 'EX', 300)
    return { ...body, sms_code: code }
  }
  for (let n = 0; n < 4; n++) {
    const { reply, body } = await receiveCode()
    t.equal(reply.statusCode, 202)
    t.equal((await api.signUp(body)).statusCode, 201)
    t.equal((await api.sendCode(body.mobile, { from })).statusCode, 202)
    const reset = { ...body, sms_code: webhook.received.at(-1)?.code }
    t.equal((await api.resetPassword(reset)).statusCode, 200)
    await app.mobileSignup.inFlight.drain()
  }
  async function counts(): Promise<number[]> {
    // No request waits for a refund.
    await app.mobileSignup.inFlight.drain()
    return Promise.all(counters.map((key) => redis.zcard(key)))
  }
  t.strictSame(await counts(), [0, 0])

  const { body: unused } = await receiveCode()
  t.equal((await receiveCode()).reply.statusCode, 202)
  t.equal((await receiveCode()).reply.statusCode, 429, 'two unused codes')
  t.equal((await api.signUp(unused)).statusCode, 201)
  t.strictSame(await counts(), [1, 1])
  t.equal((await receiveCode()).reply.statusCode, 202, 'one of them is used')
})

t.test(
  '503 4001: if limits may have been consumed, Retry-After is the time until the next resend, and nothing is sent',
  async (t) => {
    const proxy = await openProxy(t, 'REDIS_URL')
    const { app } = await buildWithWebhook(t, { SMS_RESEND_S: '60', REDIS_URL: proxy.url })
    const mobile = newMobile()
    proxy.strike(`send_sms_code_${mobile}`, { kind: 'cut', bytes: 1 })
    const reply = await client(app).sendCode(mobile)
    t.strictSame([reply.statusCode, reply.json().errno, reply.headers['retry-after']], [503, '4001', '60'])

    const { app: connected, webhook } = await buildWithWebhook(t, { SMS_DAILY_MAX: '10' })
    const broken = newMobile()
    // The script fails at a value of another type. Redis itself still works, so only the service can stop the message.
    await redis.set(`sms_codes:mobile:${broken}`, 'a text')
    t.strictSame(statusAndErrno(await client(connected).sendCode(broken)), [500, '4500'])
    t.equal(webhook.received.length, 0)
  }
)

t.test(
  'if no code can be stored, the units of the mobile are refunded, or Retry-After says that they are not',
  async (t) => {
    const proxy = await openProxy(t, 'REDIS_URL')
    const { app, webhook } = await buildWithWebhook(t, { SMS_RESEND_S: '60', REDIS_URL: proxy.url })
    const [refunded, lost] = [newMobile(), newMobile()]
    // The script fails at a value of another type. Redis itself still works.
    await redis.hset(`{sms_code_${refunded}}:issue`, 'field', 'value')
    proxy.strike(`{sms_code_${lost}}:issue`, { kind: 'reset' })
    for (const [mobile, expected, count] of [
      [refunded, [500, '4500', undefined], 0],
      [lost, [503, '4001', '60'], 1]
    ] as const) {
      const reply = await client(app).sendCode(mobile)
      t.strictSame([reply.statusCode, reply.json().errno, reply.headers['retry-after']], expected)
      t.equal(await redis.exists(`send_sms_code_${mobile}`), count)
    }
    t.equal(webhook.received.length, 0)
  }
)

t.test('Retry-After of a message that may be delivered is SMS_RESEND_S if Redis does not answer', async (t) => {
  const proxy = await openProxy(t, 'REDIS_URL')
  const { app, webhook } = await buildWithWebhook(t, { SMS_RESEND_S: '60', REDIS_URL: proxy.url })
  const mobile = newMobile()
  webhook.answer = (_, response) => {
    proxy.strike(`send_sms_code_${mobile}`, { kind: 'reset' })
    response.writeHead(500).end()
  }
  const reply = await client(app).sendCode(mobile)
  t.strictSame([reply.statusCode, reply.json().errno, reply.headers['retry-after']], [503, '4301', '60'])
})

t.test('a connection failure is retried once with the same id', async (t) => {
  const { app, webhook } = await buildWithWebhook(t)
  webhook.answer = ({ socket }) => {
    webhook.answer = accept
    socket.destroy()
  }
  t.equal((await client(app).sendCode(newMobile())).statusCode, 202)
  t.equal(webhook.received.length, 2)
  t.equal(webhook.received[0]?.id, webhook.received[1]?.id)
})

t.test('a gateway that refuses single numbers keeps getting messages', async (t) => {
  const { app, webhook } = await buildWithWebhook(t)
  webhook.answer = (_, response) => response.writeHead(422).end()
  for (let n = 0; n < 8; n++) t.equal((await client(app).sendCode(newMobile())).json().errno, '4301')
  t.equal(webhook.received.length, 8)
  webhook.answer = accept
  t.equal((await client(app).sendCode(newMobile())).statusCode, 202)
})

t.test('each of the six digits of a code is uniformly distributed', async (t) => {
  const app = await build(t, unlimitedSms)
  const codeCount = 5_000
  const mobiles = Array.from({ length: codeCount }, (_, index) => `1390000${1_000 + index}`)
  await Promise.all(
    mobiles.map((mobile) => app.mobileSignup.codes.issue(mobile, undefined, { id: mobile, network: '192.0.2.1' }))
  )
  const codes = await redis.mget(mobiles.map((mobile) => `sms_code_${mobile}`))
  t.ok(codes.every((code) => code !== null && /^\d{6}$/.test(code)))

  // Six standard deviations: one run in eight million fails by chance.
  const tolerance = 6 * Math.sqrt(codeCount * 0.1 * 0.9)
  for (const position of [0, 1, 2, 3, 4, 5]) {
    for (const digit of '0123456789') {
      const count = codes.filter((code) => code?.[position] === digit).length
      t.ok(Math.abs(count - codeCount / 10) < tolerance, `digit ${digit} at position ${position}: ${count}`)
    }
  }
})

t.test('G7: without a webhook the log says that no SMS is sent, and does not show the code', async (t) => {
  const app = await build(t, unlimitedSms)
  const mobile = newMobile()
  const earlierLog = log()
  t.equal((await client(app).sendCode(mobile)).statusCode, 202)
  const lines = log().slice(earlierLog.length).trim().split('\n')
  t.match(lines.join(), 'no SMS is sent')
  // Without these fields, which contain six digits by chance.
  const deterministic = lines.map((line) => JSON.stringify({ ...JSON.parse(line), time: 0, pid: 0, reqId: '', ms: 0 }))
  t.notMatch(deterministic.join(), `${await redis.get(`sms_code_${mobile}`)}`)
})
