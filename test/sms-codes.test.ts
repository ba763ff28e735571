import t, { type Test } from 'tap'
import { client, type Reply, statusAndErrno } from '../testkit/client.js'
import { type Answer, accept, answerWith, startWebhook, unlimitedSms } from '../testkit/sms-webhook.js'
import { startTestbed } from '../testkit/testbed.js'
import { until } from '../testkit/until.js'

/*
 * POST /sms_codes: codes, their messages, and the limits on them. test/codes.test.ts has the scripts, test/limits.test.ts how
 * limits count, and test/sms-webhook.test.ts what is known of a message.
 */

const { build, redis, newMobile, issueCode, openProxy, signUpBody, log } = await startTestbed(t)

const webhook = await startWebhook(t)
const { answers } = webhook
const messagesTo = (mobile: string) => webhook.received.filter((message) => message.mobile === mobile)

const unlimited = { ...unlimitedSms, SMS_WEBHOOK_URL: webhook.url, SMS_WEBHOOK_SECRET: 'the secret of the webhook' }
const limits = {
  SMS_RESEND_S: '60',
  SMS_DAILY_MAX: '2',
  SMS_IP_HOURLY_MAX: '10',
  SMS_PREFIX_HOURLY_MAX: '15',
  SMS_HOURLY_MAX: '20'
}
const proxy = await openProxy(t, 'REDIS_URL')
const open = client(await build(t, unlimited))
const limitedApp = await build(t, { ...unlimited, ...limits, TRUST_PROXY: '10.0.0.0/8' })
const limited = client(limitedApp)
/** A test causes faults in its round trips to Redis. */
const faulty = client(await build(t, { ...unlimited, ...limits, REDIS_URL: proxy.url }))

// All tests count under the same keys.
t.beforeEach(async () => {
  await redis.flushall()
})

const codeKey = (mobile: string) => `sms_code_${mobile}`
const resendKey = (mobile: string) => `send_sms_code_${mobile}`
const minutePasses = (mobile: string) => redis.del(resendKey(mobile))
const gatewayFails = { errno: '4301', errmsg: '第三方系统错误' }

/** Adds units of earlier messages to a limit. */
const addUnits = (key: string, count: number) =>
  redis.zadd(key, ...Array.from({ length: count }, (_, n) => [Date.now(), `earlier ${n}`]).flat())

/**
 * Sends a request, and checks that its Retry-After is the TTL of the limit's key, rounded up. The TTL is read before and after the
 * request, because it runs.
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

t.test('202: six digits are sent, signed, and the same ones again; the reply is the same if registered', async (t) => {
  const mobile = newMobile()
  const body = { ...(await signUpBody()), mobile }
  const reply = await open.sendCode(mobile)
  const { ticket } = reply.json().data
  t.strictSame([reply.statusCode, reply.json()], [202, { errno: '0', errmsg: '发送成功', data: { ticket } }])
  t.match(ticket, /^[\w-]{12}\.[0-9a-z]+\.[\w-]{43}$/)
  const [message, ...others] = messagesTo(mobile)
  t.strictSame(others, [])
  t.match(message, { mobile, code: /^\d{6}$/, ttl_s: 300, id: /^[0-9a-f-]{36}$/, signature: /^v1,[\w+/]{43}=$/ })
  t.match(message, { purpose: null, language: 'zh' })
  t.equal(await redis.get(codeKey(mobile)), message?.code)
  t.ok((await redis.ttl(codeKey(mobile))) > 240)

  await redis.pexpire(codeKey(mobile), 200_000)
  t.equal((await open.sendCode(mobile, { purpose: 'password' })).statusCode, 202)
  const resent = messagesTo(mobile)[1]
  t.equal(resent?.code, message?.code, 'people type the first of two messages')
  t.not(resent?.id, message?.id)
  t.ok(resent && resent.ttl_s > 170 && resent.ttl_s <= 200, 'the message tells the remaining life')
  t.equal((await open.signUp({ ...body, sms_code: message?.code })).statusCode, 201)

  const registered = await open.sendCode(mobile)
  const sameReply = { ...reply.json(), data: { ticket: registered.json().data.ticket } }
  t.strictSame([registered.statusCode, registered.json()], [202, sameReply])
})

t.test('400: a bad mobile or purpose is refused; SMS=off has no route; without a webhook no SMS is sent', async (t) => {
  const earlierCount = webhook.received.length
  for (const mobile of ['', '12900001111', 13900001111]) {
    t.strictSame(statusAndErrno(await open.sendCode(mobile)), [400, '4103'])
  }
  for (const purpose of [null, '', 'login', 1]) {
    const reply = await open.sendCode(newMobile(), { purpose })
    t.strictSame([reply.statusCode, reply.json().errmsg], [400, '参数错误'])
  }
  t.equal(webhook.received.length, earlierCount)
  t.equal((await client(await build(t, { SMS: 'off' })).sendCode(newMobile())).statusCode, 404)

  const unconnected = client(await build(t, unlimitedSms))
  const mobile = newMobile()
  const earlierLog = log()
  t.equal((await unconnected.sendCode(mobile)).statusCode, 202)
  const lines = log().slice(earlierLog.length).trim().split('\n')
  t.match(lines.join(), 'no SMS is sent')
  // Without these fields, which contain six digits by chance.
  const deterministic = lines.map((line) => JSON.stringify({ ...JSON.parse(line), time: 0, pid: 0, reqId: '', ms: 0 }))
  t.notMatch(deterministic.join(), `${await redis.get(codeKey(mobile))}`, 'G7: the code is not in the log')
})

t.test('429 4201: a resend within SMS_RESEND_S, also after another service, has the exact Retry-After', async (t) => {
  const [ours, theirs] = [newMobile(), newMobile()]
  await limited.sendCode(ours)
  const ttl = await redis.ttl(resendKey(ours))
  t.ok(ttl > 40 && ttl <= 60, `TTL ${ttl}`)
  await redis.set(resendKey(theirs), 'sent', 'EX', 30)
  await redis.pexpire(resendKey(ours), 41_500)
  for (const [mobile, messages] of [
    [ours, 1],
    [theirs, 0]
  ] as const) {
    const reply = await checkRetryAfter(t, resendKey(mobile), () => limited.sendCode(mobile))
    t.strictSame([reply.statusCode, reply.json()], [429, { errno: '4201', errmsg: '请求过于频繁，请稍后重试' }])
    t.equal(messagesTo(mobile).length, messages)
    t.equal(await redis.get(codeKey(mobile)), messagesTo(mobile)[0]?.code ?? null, 'no code is made or changed')
  }
})

t.test('G8: a code serves what a refused request has asked for, whichever limit has refused it', async (t) => {
  const from = '198.51.100.9'
  for (const refusedBy of ['SMS_RESEND_S', 'SMS_DAILY_MAX', 'SMS_IP_HOURLY_MAX'] as const) {
    const mobile = newMobile()
    const body = { ...(await signUpBody()), mobile }
    // A stranger asks for the other purpose, as often as the limit allows, and the owner is refused.
    t.equal((await limited.sendCode(mobile, { purpose: 'password', from })).statusCode, 202)
    t.equal((await limited.signUp({ ...body, sms_code: messagesTo(mobile)[0]?.code })).statusCode, 422)
    t.equal(await redis.exists(`{sms_code_${mobile}}:guesses`), 0, 'a right code for something else costs nothing')
    if (refusedBy !== 'SMS_RESEND_S') await minutePasses(mobile)
    if (refusedBy === 'SMS_DAILY_MAX') await addUnits(`sms_codes:mobile:${mobile}`, 1)
    if (refusedBy === 'SMS_IP_HOURLY_MAX') await addUnits(`sms_codes:network:${from}`, 10)
    t.equal((await limited.sendCode(mobile, { purpose: 'sign_up', from })).statusCode, 429)
    const [message, ...others] = messagesTo(mobile)
    t.strictSame(others, [])
    t.equal((await limited.signUp({ ...body, sms_code: message?.code })).statusCode, 201, refusedBy)
  }
})

t.test('G8: 60 parallel requests on two instances send exactly as many codes as each limit allows', async (t) => {
  const mobile = newMobile()
  const ofPrefix = (n: number) => `1500000${1_000 + n}`
  const otherAddress = (n: number) => `198.18.0.${n}`
  for (const [limit, allowed, mobileOf, addressOf] of [
    ['SMS_RESEND_S', 1, () => mobile, otherAddress],
    ['SMS_IP_HOURLY_MAX', 10, newMobile, () => '203.0.113.1'],
    ['SMS_PREFIX_HOURLY_MAX', 15, ofPrefix, otherAddress],
    ['SMS_HOURLY_MAX', 20, newMobile, otherAddress],
    ['all of them', 10, (n) => ofPrefix(n % 12), () => '203.0.113.1']
  ] as [string, number, (n: number) => string, (n: number) => string][]) {
    await redis.flushall()
    const earlierCount = webhook.received.length
    const replies = await Promise.all(
      Array.from({ length: 60 }, (_, n) => (n % 2 ? limited : faulty).sendCode(mobileOf(n), { from: addressOf(n) }))
    )
    const accepted = replies.filter(({ statusCode }) => statusCode === 202)
    t.strictSame([accepted.length, webhook.received.length - earlierCount], [allowed, allowed], limit)
    for (const { statusCode, headers } of replies) {
      if (statusCode !== 202) t.match([statusCode, `${headers['retry-after']}`], [429, /^[1-9]\d*$/])
    }
  }
})

t.test('G8: limits count the client behind TRUST_PROXY, whatever it and the ports say', async (t) => {
  for (const [from, forwardedFor, ...networks] of [
    ['192.0.2.1', undefined, '192.0.2.1'],
    ['2001:db8::1', undefined, '2001:db8:0:0::/64', '2001:db8:0::/48'],
    ['10.0.0.1', '192.0.2.1', '192.0.2.1'],
    ['10.0.0.2', '198.18.0.1, 10.0.0.6:443', '198.18.0.1'],
    ['::ffff:10.0.0.1', '198.18.0.2:5000,[::ffff:10.0.0.6]:443', '198.18.0.2'],
    ['10.0.0.2', '198.18.0.9, 198.18.0.1:1234, 10.0.0.7:443, 10.0.0.6', '198.18.0.1'],
    ['198.51.100.1', '192.0.2.3', '198.51.100.1']
  ] as const) {
    await redis.flushall()
    const headers = forwardedFor === undefined ? {} : { 'x-forwarded-for': forwardedFor }
    t.equal((await limited.sendCode(newMobile(), { from, headers })).statusCode, 202)
    const counted = (await redis.keys('sms_codes:network:*')).map((key) => key.replace('sms_codes:network:', ''))
    t.strictSame(counted.sort(), [...networks].sort(), `${from} for ${forwardedFor}`)
  }
})

t.test('503 4301: a message was certainly not sent: its code is withdrawn, and the mobile may ask again', async (t) => {
  const mobile = newMobile()
  const from = '198.51.100.77'
  const networkKey = `sms_codes:network:${from}`
  await issueCode(mobile)
  answers.set(mobile, answerWith(400))
  const reply = await limited.sendCode(mobile, { from })
  t.strictSame([reply.statusCode, reply.json()], [503, gatewayFails])
  t.match(`${reply.headers['retry-after']}`, /^[1-9]$/)
  t.equal(messagesTo(mobile).length, 1)
  t.equal(await redis.exists(codeKey(mobile)), 0, 'neither it nor the former one is left')
  t.equal(await redis.exists(resendKey(mobile), `sms_codes:mobile:${mobile}`), 0, 'its limits are refunded')
  t.equal(await redis.zcard(networkKey), 1, 'the limit of the address is not')
  await addUnits(networkKey, 8)
  await checkRetryAfter(t, networkKey, () => limited.sendCode(mobile, { from }), 3_600)
})

t.test('503 4301: a message may have been sent: its code works, and nothing is given back', async (t) => {
  const body = await signUpBody()
  const { mobile } = body
  answers.set(mobile, answerWith(500))
  await redis.del(codeKey(mobile))
  const reply = await checkRetryAfter(t, resendKey(mobile), () => limited.sendCode(mobile), 60)
  t.strictSame([reply.statusCode, reply.json()], [503, gatewayFails])
  t.equal((await limited.sendCode(mobile)).statusCode, 429, 'not again before that')
  t.equal(await redis.zcard(`sms_codes:mobile:${mobile}`), 1, 'the daily limit counts it')
  await minutePasses(mobile)
  await checkRetryAfter(t, `sms_codes:mobile:${mobile}`, () => limited.sendCode(mobile), 86_400)
  const [message] = messagesTo(mobile)
  t.equal((await limited.signUp({ ...body, sms_code: message?.code })).statusCode, 201)
})

t.test('503 4301: only five mobiles and half of all stop the messages, and then nothing is consumed', async (t) => {
  const { sendCode } = client(await build(t, { ...unlimited, SMS_RESEND_S: '60' }))
  const send = async (answer: Answer, mobile = newMobile()) => {
    answers.set(mobile, answer)
    const { statusCode, headers } = await sendCode(mobile)
    return [statusCode, messagesTo(mobile).length, headers['retry-after']]
  }
  for (let n = 0; n < 3; n++) t.match(await send(answerWith(422)), [503, 1], 'a gateway that refuses a number works')
  const failing = newMobile()
  for (let n = 1; n <= 6; n++) {
    await minutePasses(failing)
    t.match(await send(answerWith(502), failing), [503, n], 'one mobile cannot stop the others')
  }
  for (let n = 0; n < 4; n++) t.match(await send(answerWith(500)), [503, 1])
  const mobile = newMobile()
  t.match(await send(accept, mobile), [503, 0, /^[1-5]$/], 'five of eight have failed')
  t.equal(await redis.exists(resendKey(mobile), codeKey(mobile)), 0)
})

t.test('G8: a code that completes a sign-up or a reset gives the units of all its messages back', async (t) => {
  const from = '203.0.113.77'
  const counters = ['sms_codes:all', `sms_codes:network:${from}`]
  async function counts(): Promise<number[]> {
    // No request waits for a refund.
    await limitedApp.mobileSignup.inFlight.drain()
    return Promise.all(counters.map((key) => redis.zcard(key)))
  }
  const mobile = newMobile()
  const body = { ...(await signUpBody()), mobile }
  /** Asks twice for a code, and returns a body with it. */
  async function receiveCode() {
    for (let n = 0; n < 2; n++) {
      await redis.del(resendKey(mobile), `sms_codes:mobile:${mobile}`)
      t.equal((await limited.sendCode(mobile, { from })).statusCode, 202)
    }
    return { ...body, sms_code: messagesTo(mobile).at(-1)?.code }
  }
  const first = await receiveCode()
  t.strictSame(await counts(), [2, 2])
  t.equal((await limited.signUp(first)).statusCode, 201)
  t.strictSame(await counts(), [0, 0])
  const second = await receiveCode()
  await addUnits('sms_codes:all', 1)
  t.equal((await limited.signUp(second)).statusCode, 409)
  t.strictSame(await counts(), [3, 2], 'used in vain')
  t.equal((await limited.resetPassword(await receiveCode())).statusCode, 200)
  t.strictSame(await counts(), [3, 2])
})

t.test('if Redis fails, no message is sent, and Retry-After tells what may have been consumed', async (t) => {
  const from = '198.51.100.5'
  const untilUsable = () =>
    until('Redis is used again', async () => (await faulty.sendCode(newMobile(), { from })).statusCode === 202)
  const [unknown, broken, unstored, lost, sent] = [newMobile(), newMobile(), newMobile(), newMobile(), newMobile()]
  proxy.strike(resendKey(unknown), { kind: 'cut', bytes: 1 })
  proxy.strike(`{sms_code_${lost}}:issue`, { kind: 'reset' })
  // Scripts fail at values of another type. Redis itself still works, so only the service can stop the message.
  await redis.set(`sms_codes:mobile:${broken}`, 'a text')
  await redis.hset(`{sms_code_${unstored}}:issue`, 'field', 'value')
  for (const [name, mobile, status, errno, retryAfter, units] of [
    ['the limits may have been consumed', unknown, 503, '4001', '60', 1],
    ['the limits were not consumed', broken, 500, '4500', undefined, 0],
    ['no code was stored, and the units were refunded', unstored, 500, '4500', undefined, 0],
    ['no code may be stored, and the units were not refunded', lost, 503, '4001', '60', 1]
  ] as const) {
    const reply = await faulty.sendCode(mobile)
    t.strictSame([...statusAndErrno(reply), reply.headers['retry-after']], [status, errno, retryAfter], name)
    t.equal(await redis.exists(resendKey(mobile)), units, name)
    t.strictSame(messagesTo(mobile), [], name)
    await untilUsable()
  }

  answers.set(sent, (_, response) => {
    proxy.strike(resendKey(sent), { kind: 'reset' })
    response.writeHead(500).end()
  })
  const reply = await faulty.sendCode(sent)
  t.strictSame([...statusAndErrno(reply), reply.headers['retry-after']], [503, '4301', '60'], 'SMS_RESEND_S')
})
