import { createHmac } from 'node:crypto'
import { createServer, type IncomingMessage, type ServerResponse } from 'node:http'
import type { FastifyInstance } from 'fastify'
import t, { type Test } from 'tap'
import type { Environment } from '../dist/config/config.js'
import { freePort } from '../dist/dev/embedded-stores.js'
import { networkOf } from '../dist/http/network.js'
import { client, type Reply, statusAndErrno } from '../testkit/client.js'
import { listen } from '../testkit/listen.js'
import { startTestbed } from '../testkit/testbed.js'
import { until } from '../testkit/until.js'

const { build, redis, newMobile, issueCode, signUpBody, log } = await startTestbed(t)

const webhookSecret = 'the secret of the webhook'

/** A message as the webhook receives it. */
interface ReceivedMessage {
  mobile: string
  code: string
  ttl_s: number
  id: string
  signature: string | string[] | undefined
  /** The bytes that are signed. */
  body: string
}

type Answer = (request: IncomingMessage, response: ServerResponse, message: ReceivedMessage) => void

const accept: Answer = (_request, response) => response.end('{}')

/** Starts an SMS gateway on loopback that records its messages. It accepts them until a test replaces `answer`. */
async function startWebhook(t: Test) {
  const webhook = { received: [] as ReceivedMessage[], url: '', answer: accept }
  const server = createServer(async (request, response) => {
    let body = ''
    for await (const chunk of request) body += chunk
    const message: ReceivedMessage = { ...JSON.parse(body), body, signature: request.headers['x-signature'] }
    webhook.received.push(message)
    webhook.answer(request, response, message)
  })
  webhook.url = `${await listen(t, server)}/sms`
  return webhook
}

/** No rate limit but what a test sets, and timeouts of the stores that a busy machine does not reach. */
const unlimited = {
  SMS_RESEND_S: '0',
  SMS_DAILY_MAX: '0',
  SMS_IP_HOURLY_MAX: '0',
  SMS_PREFIX_HOURLY_MAX: '0',
  STORE_TIMEOUT_MS: '20000'
}

async function buildWithWebhook(t: Test, env: Environment = {}) {
  const webhook = await startWebhook(t)
  const app = await build(t, {
    SMS_WEBHOOK_URL: webhook.url,
    SMS_WEBHOOK_SECRET: webhookSecret,
    ...unlimited,
    ...env
  })
  return { app, webhook }
}

/**
 * Sends a request that a rate limit refuses, and checks that its Retry-After is the TTL of the limit's key, rounded up. The
 * TTL is read before and after the request, because it runs.
 */
async function checkRetryAfter(t: Test, key: string, send: () => Promise<Reply>): Promise<Reply> {
  const longest = Math.ceil((await redis.pttl(key)) / 1_000)
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
  t.strictSame([reply.statusCode, reply.json()], [202, { errno: '0', errmsg: '发送成功' }])
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
  t.strictSame([registered.statusCode, registered.json()], [202, reply.json()], 'the same for a registered mobile')
})

t.test('an invalid mobile is refused with 400, and SMS=off has no route', async (t) => {
  const { app, webhook } = await buildWithWebhook(t)
  for (const mobile of ['', '12900001111', 13900001111]) {
    t.strictSame(statusAndErrno(await client(app).sendCode(mobile)), [400, '4103'])
  }
  t.equal(webhook.received.length, 0)
  t.equal((await client(await build(t, { SMS: 'off' })).sendCode(newMobile())).statusCode, 404)
})

t.test('a second code replaces the first and its wrong guesses', async (t) => {
  const { app, webhook } = await buildWithWebhook(t, { SMS_CODE_ATTEMPTS: '2' })
  const body = await signUpBody()
  await client(app).sendCode(body.mobile)
  t.equal((await client(app).signUp({ ...body, sms_code: 'wrong' })).statusCode, 422)
  await client(app).sendCode(body.mobile)
  t.equal((await client(app).signUp({ ...body, sms_code: 'wrong' })).statusCode, 422)
  t.equal((await client(app).signUp({ ...body, sms_code: webhook.received[1]?.code })).statusCode, 201)
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
    const otherApp = await build(t, { SMS_WEBHOOK_URL: webhook.url, ...unlimited, ...env })
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

t.test('limits count the client address behind TRUST_PROXY, and an IPv6 /64 as one client', async (t) => {
  t.equal(networkOf('192.0.2.1'), '192.0.2.1')
  t.equal(networkOf('::ffff:192.0.2.1'), '192.0.2.1')
  t.equal(networkOf('2001:db8:1:2:3:4:5:6'), '2001:db8:1:2::/64')
  t.equal(networkOf('192.0.2.1:5678'), '192.0.2.1')
  t.equal(networkOf('[2001:db8:1:2::1]:5678'), '2001:db8:1:2::/64')
  for (const invalid of ['unknown', '', '_hidden', undefined]) t.equal(networkOf(invalid), 'unknown')

  const { app } = await buildWithWebhook(t, { SMS_IP_HOURLY_MAX: '1', TRUST_PROXY: '10.0.0.0/8' })
  const statusOf = async (from: string, forwardedFor?: string) => {
    const headers = forwardedFor === undefined ? {} : { 'x-forwarded-for': forwardedFor }
    return (await client(app).sendCode(newMobile(), { from, headers })).statusCode
  }
  t.equal(await statusOf('2001:db8::1'), 202)
  t.equal(await statusOf('2001:db8::2'), 429, 'the same /64')
  t.equal(await statusOf('2001:db8:0:1::1'), 202, 'another /64')
  t.equal(await statusOf('10.0.0.1', '192.0.2.1'), 202)
  t.equal(await statusOf('10.0.0.1', '192.0.2.2'), 202)
  t.equal(await statusOf('10.0.0.2', '192.0.2.1'), 429, 'the same client behind another trusted proxy')
  t.equal(await statusOf('198.51.100.1', '192.0.2.3'), 202)
  t.equal(await statusOf('198.51.100.1', '192.0.2.4'), 429, 'a header of an untrusted address does not count')
})

// Both wait for fixed times of the service, so they run in parallel.
t.test('a gateway that fails', async (t) => {
  t.jobs = 2

  t.test('each failure is 503 4301, and the previous code and the limits are restored', async (t) => {
    const webhook = await startWebhook(t)
    const closedUrl = `http://127.0.0.1:${await freePort()}/`
    const [first, second, withoutGateway] = await Promise.all(
      [webhook.url, webhook.url, closedUrl].map((url) =>
        build(t, { ...unlimited, SMS_WEBHOOK_URL: url, SMS_RESEND_S: '60', SMS_DAILY_MAX: '1' })
      )
    )
    // Two services, because five failures in a row open the circuit breaker.
    const failures: { name: string; app: FastifyInstance | undefined; requests: number; answer?: Answer }[] = [
      { name: 'status 500', app: first, requests: 1, answer: (_, response) => response.writeHead(500).end('no') },
      { name: 'status 400', app: first, requests: 1, answer: (_, response) => response.writeHead(400).end() },
      { name: 'a closed connection', app: first, requests: 2, answer: ({ socket }) => socket.destroy() },
      { name: 'no answer', app: first, requests: 1, answer: () => undefined },
      {
        name: 'a redirect',
        app: second,
        requests: 1,
        answer: (_, response) => response.writeHead(302, { location: '/' }).end()
      },
      { name: 'not HTTP', app: second, requests: 1, answer: ({ socket }) => socket.end('SMTP 220 hello\r\n\r\n') },
      { name: 'half an answer', app: second, requests: 1, answer: ({ socket }) => socket.write('HTTP/1.1 200') },
      { name: 'no listener', app: withoutGateway, requests: 0 }
    ]
    const answers = new Map<string, Answer>()
    webhook.answer = (request, response, message) => (answers.get(message.mobile) ?? accept)(request, response, message)

    const checks = failures.map(async ({ name, app, requests, answer }) => {
      if (app === undefined) throw new Error(`no service for ${name}`)
      const mobile = newMobile()
      if (answer) answers.set(mobile, answer)
      const previousCode = await issueCode(mobile)
      await redis.pexpire(`sms_code_${mobile}`, 100_000)
      const startedAt = Date.now()
      const reply = await client(app).sendCode(mobile)
      // The service waits for 5 s. The rest is for a busy machine: fetch itself waits for 300 s.
      t.ok(Date.now() - startedAt < 30_000, `${name}: the wait is bounded`)
      t.strictSame([reply.statusCode, reply.json()], [503, { errno: '4301', errmsg: '第三方系统错误' }], name)
      t.match(`${reply.headers['retry-after']}`, /^[1-9]\d*$/)
      const received = webhook.received.filter((message) => message.mobile === mobile)
      t.equal(received.length, requests, `${name}: ${requests} requests`)
      t.equal(new Set(received.map(({ id }) => id)).size, Math.min(requests, 1), `${name}: one message id`)
      t.equal(await redis.get(`sms_code_${mobile}`), previousCode, `${name}: the previous code`)
      const ttlMs = await redis.pttl(`sms_code_${mobile}`)
      t.ok(ttlMs > 40_000 && ttlMs <= 100_000, `${name}: its TTL, ${ttlMs} ms`)
      t.equal(await redis.exists(`send_sms_code_${mobile}`), 0, `${name}: the resend limit is refunded`)
      if (answer === undefined) return
      answers.delete(mobile)
      t.equal((await client(app).sendCode(mobile)).statusCode, 202, `${name}: the next request is not limited`)
    })
    await Promise.all(checks)
  })

  t.test('after five failures in a row it gets no messages until a trial succeeds', async (t) => {
    const { app, webhook } = await buildWithWebhook(t)
    webhook.answer = (_, response) => response.writeHead(500).end()
    const startedAt = Date.now()
    for (let n = 0; n < 8; n++) t.equal((await client(app).sendCode(newMobile())).json().errno, '4301')
    // A busy machine may need more than the 5 s to the next trial.
    const trialCount = Math.floor((Date.now() - startedAt) / 5_000)
    const receivedCount = webhook.received.length
    t.ok(receivedCount >= 5 && receivedCount <= 5 + trialCount, `${receivedCount} messages`)

    const trialResponse = new Promise<ServerResponse>((resolve) => {
      webhook.answer = (_, response) => resolve(response)
    })
    let trial: Promise<Reply> | undefined
    await until('a trial message reaches the gateway', () => {
      trial = client(app).sendCode(newMobile())
      return Promise.race([trialResponse.then(() => true), trial.then(() => false)])
    })
    t.equal((await client(app).sendCode(newMobile())).json().errno, '4301', 'others are refused during the trial')
    t.equal(webhook.received.length, receivedCount + 1)
    webhook.answer = accept
    const response = await trialResponse
    response.end()
    t.equal((await trial)?.statusCode, 202)
    t.equal((await client(app).sendCode(newMobile())).statusCode, 202, 'the gateway is used again')
  })
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
  const app = await build(t, unlimited)
  const codeCount = 5_000
  const mobiles = Array.from({ length: codeCount }, (_, index) => `1390000${1_000 + index}`)
  await Promise.all(mobiles.map((mobile) => app.codes.issue(mobile)))
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

t.test('the log shows a code only with the private stores', async (t) => {
  for (const embedded of [true, false]) {
    const app = await build(t, unlimited, { changes: { embedded } })
    const mobile = newMobile()
    const earlierLog = log()
    t.equal((await client(app).sendCode(mobile)).statusCode, 202)
    const code = await redis.get(`sms_code_${mobile}`)
    const lines = log().slice(earlierLog.length).trim().split('\n')
    const smsLines = lines.map((line) => JSON.parse(line)).filter(({ msg }) => msg === 'SMS code')
    t.equal(smsLines.length, 1)
    t.equal(smsLines[0].code, embedded ? code : undefined)
    // Without these fields, which contain six digits by chance.
    const deterministic = lines.map((line) =>
      JSON.stringify({ ...JSON.parse(line), time: 0, pid: 0, reqId: '', ms: 0 })
    )
    t.equal(deterministic.join().includes(`${code}`), embedded)
  }
})
