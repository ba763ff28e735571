import assert from 'node:assert/strict'
import { randomInt } from 'node:crypto'
import { mock } from 'node:test'
import fc from 'fast-check'
import t, { type Test } from 'tap'
import { Tickets } from '#src/codes/tickets.js'
import type { Environment } from '#src/config/config.js'
import { client, statusAndErrno } from '../testkit/client.js'
import { withMovedClock } from '../testkit/moved-clock.js'
import { accept, answerWith, startWebhook, unlimitedSms } from '../testkit/sms-webhook.js'
import { claimKey, startTestbed } from '../testkit/testbed.js'

/*
 * G8: nobody guesses or blocks. test/sms-codes.test.ts and test/logins.test.ts have the limits on messages and logins.
 */

const testbed = await startTestbed(t)
const { build, buildHashingAfter, issueCode, newMobile, postgres, redis, openProxy, signUpBody, holdInserts, stores } =
  testbed

const api = client(await build(t, unlimitedSms))

const guessesKey = (mobile: string) => `{sms_code_${mobile}}:guesses`
const network = (n: number) => `198.18.${n >> 8}.${n & 255}`

type Body = Awaited<ReturnType<typeof signUpBody>> & { ticket?: string }

/** Six digits, because what cannot be a code costs nothing. The codes of `issueCode` have letters. */
const wrongCode = '000000'

/** Presents a wrong code. Returns the status of the reply. */
const guess = async (body: Body, from = network(1), { signUp } = api) =>
  (await signUp({ ...body, sms_code: wrongCode }, { from })).statusCode

/** Presents the right code. */
const redeem = async (body: Body, from = network(1), { signUp } = api) => (await signUp(body, { from })).statusCode

/** Asks for a code as its owner does. Returns a body with the code and the ticket. */
async function requestCode(mobile = newMobile(), { sendCode } = api): Promise<Body> {
  const body = await signUpBody({ mobile })
  const { ticket } = (await sendCode(mobile)).json().data
  return { ...body, sms_code: `${await redis.get(`sms_code_${mobile}`)}`, ticket }
}

/** Returns a ticket that the service has issued so many seconds ago. */
function ticketOf(mobile: string, ageSeconds: number): string {
  const now = Date.now()
  const clock = mock.method(Date, 'now', () => now - ageSeconds * 1_000)
  const ticket = new Tickets([stores.environment.SESSION_SECRET ?? '']).issue(mobile)
  clock.mock.restore()
  return ticket
}

/** Makes the windows of all budgets of a mobile end earlier. */
async function ageGuesses(mobile: string, seconds: number): Promise<void> {
  for (const [field, value] of Object.entries(await redis.hgetall(guessesKey(mobile)))) {
    const [count, end] = value.split(' ')
    await redis.hset(guessesKey(mobile), field, `${count} ${Number(end) - seconds * 1_000}`)
  }
}

/** Builds a service whose hashes fail, so that each right code is held and released unused. */
const buildFailing = (t: Test, env?: Environment) =>
  buildHashingAfter(t, () => Promise.reject(new Error('no memory for a hash')), env)

t.test('G8: in production a limit that is turned off is named at the start', async (t) => {
  const lines: string[] = []
  const env = {
    SESSION_SECRET: 'x'.repeat(32),
    SMS: 'off',
    TRUST_PROXY: 'none',
    HASH_MEMORY_KIB: '7168',
    HASH_PASSES: '5'
  }
  const off = { SMS_GUESS_DAILY_MAX: '0', LOGIN_IP_HOURLY_MAX: '0' }
  for (const variables of [{ NODE_ENV: 'production', ...env, ...off }, off]) {
    await build(t, variables, { logStream: { write: (line) => lines.push(line) } })
  }
  const limits = lines.map((line) => JSON.parse(line)).flatMap(({ limits }) => (limits === undefined ? [] : [limits]))
  t.strictSame(limits, [['SMS_GUESS_DAILY_MAX', 'LOGIN_IP_HOURLY_MAX']])
})

t.test(
  'G8: a wrong code leaves the code; the sixth try of a network in an hour is 429, also a right one',
  async (t) => {
    const body = await signUpBody()
    for (let n = 0; n < 5; n++) t.equal(await guess(body), 422)
    for (const sms_code of [wrongCode, body.sms_code]) {
      const reply = await api.signUp({ ...body, sms_code }, { from: network(1) })
      t.strictSame(statusAndErrno(reply), [429, '4201'])
      const seconds = Number(reply.headers['retry-after'])
      t.ok(seconds > 3_500 && seconds <= 3_600, `${seconds} s`)
    }
    t.equal(await redis.get(`sms_code_${body.mobile}`), body.sms_code)
    await ageGuesses(body.mobile, 3_540)
    t.match((await api.signUp(body, { from: network(1) })).headers['retry-after'], /^(60|[1-5]?\d)$/)
    await ageGuesses(body.mobile, 60)
    t.equal(await redeem(body), 201, 'after the hour')
  }
)

t.test('G8: tries are counted before a code is looked at, so parallel guesses do not slip through', async (t) => {
  const apis = [api, client(await build(t))]
  const body = await signUpBody()
  const statuses = await Promise.all(Array.from({ length: 60 }, (_, n) => guess(body, network(1), apis[n % 2])))
  t.equal(statuses.filter((status) => status === 422).length, 5)
  t.equal(statuses.filter((status) => status === 429).length, 55)
})

t.test('G8: nobody can block the holder of a ticket, who has five tries of their own', async (t) => {
  const body = await requestCode()
  const { ticket: _, ...withoutTicket } = body
  for (let n = 0; n < 60; n++) await guess(withoutTicket, network(n >> 2))
  t.equal(await redeem(withoutTicket, network(999)), 429, 'all without a ticket are refused')
  t.equal(await redeem(withoutTicket), 429)
  for (let n = 0; n < 4; n++) t.equal(await guess(body), 422)
  t.equal(await redeem(body), 201)

  const other = await requestCode()
  for (let n = 0; n < 5; n++) t.equal(await guess(other), 422)
  t.equal(await redeem(other), 429, 'from the same network')
  t.equal(await redeem(other, network(7)), 429, 'from any network')
  const { ticket: spent, ...owner } = other
  t.equal(await redeem(owner), 201, 'the tries of a ticket are not those of its network')
})

t.test('G8: all without a ticket have SMS_GUESS_DAILY_MAX wrong codes for a mobile in a day', async (t) => {
  const body = await signUpBody()
  for (let n = 0; n < 50; n++) t.equal(await guess(body, network(n)), 422)
  const reply = await api.signUp(body, { from: network(50) })
  t.equal(reply.statusCode, 429)
  t.ok(Number(reply.headers['retry-after']) > 86_000)
  await ageGuesses(body.mobile, 86_400)
  t.equal(await redeem(body, network(50)), 201)

  const limited = client(await build(t, { SMS_GUESS_DAILY_MAX: '2' }))
  const unlimited = client(await build(t, { SMS_GUESS_DAILY_MAX: '0' }))
  const other = await signUpBody()
  for (const expected of [422, 422, 429]) t.equal(await guess(other, network(expected), limited), expected)
  t.equal(await guess(other, network(3), unlimited), 422)
})

t.test('G8: an IPv6 /64 is a guesser, and a /48 has four times the number', async (t) => {
  const body = await signUpBody()
  for (let n = 0; n < 20; n++) t.equal(await guess(body, `2001:db8:1:${n >> 2}::${n}`), 422)
  t.equal(await guess(body, '2001:db8:1:99::1'), 429)
  t.equal(await redeem(body, '2001:db8:2::1'), 201)
})

t.test('a forged or expired ticket, or one for another mobile, counts as absent', async (t) => {
  const [body, other] = [await requestCode(), await requestCode()]
  const [id, expiry, mac] = `${body.ticket}`.split('.')
  const otherSecret = client(await build(t, { SESSION_SECRET: 'another secret of thirty-two characters' }))
  const foreign = await requestCode(body.mobile, otherSecret)
  const young = ticketOf(body.mobile, 3_540)
  const invalid = [
    other.ticket,
    foreign.ticket,
    ticketOf(body.mobile, 3_601),
    `${id}.zzzzzzzzz.${mac}`,
    `x${body.ticket}`,
    `${id}.${expiry}.`,
    '',
    '.'
  ]
  for (const [n, ticket] of invalid.entries()) {
    t.equal(await guess({ ...body, ticket: `${ticket}` }, network(n % 5)), 422)
  }
  const fields = Object.keys(await redis.hgetall(guessesKey(body.mobile))).sort()
  t.strictSame(fields, ['all', ...[0, 1, 2, 3, 4].map(network)].sort(), 'the networks are counted')
  t.equal(await guess(body), 422)
  t.equal(await guess({ ...body, ticket: young }), 422)
  const guessers = await redis.hkeys(guessesKey(body.mobile))
  t.ok(guessers.includes(`ticket:${id}`), 'a valid one is counted itself')
  t.ok(guessers.includes(`ticket:${young.split('.')[0]}`), 'also in the last minute of its hour')
})

t.test('a ticket survives a rotation of SESSION_SECRET, and a rotation gives no guesses back', async (t) => {
  const rotated = client(
    await build(t, {
      SESSION_SECRET: `a newer secret of thirty-two characters,${stores.environment.SESSION_SECRET}`
    })
  )
  const [owner, stranger] = [await requestCode(), await signUpBody()]
  for (let n = 0; n < 5; n++) {
    t.equal(await guess(owner), 422)
    t.equal(await guess(stranger), 422)
  }
  t.strictSame([await redeem(owner, network(2), rotated), await redeem(stranger, network(1), rotated)], [429, 429])
})

t.test('400: a ticket that is no string or has more than 256 characters is malformed', async (t) => {
  const body = await signUpBody()
  for (const ticket of [null, 1, {}, 'x'.repeat(257)]) {
    const reply = await api.signUp({ ...body, ticket })
    t.strictSame([reply.statusCode, reply.json().errmsg], [400, '参数错误'])
  }
  t.equal((await api.signUp({ ...body, ticket: 'x'.repeat(256) })).statusCode, 201)
  for (const purpose of [null, '', 'login', 1]) {
    const reply = await api.sendCode(newMobile(), { purpose })
    t.strictSame([reply.statusCode, reply.json().errmsg], [400, '参数错误'])
  }
})

t.test('G8: neither the answers to guesses nor Retry-After tell that a mobile has just signed up', async (t) => {
  const [unknown, signedUp, refused, usedTicket] = [
    await signUpBody(),
    await signUpBody(),
    await signUpBody(),
    newMobile()
  ]
  await redis.del(`sms_code_${unknown.mobile}`)
  t.equal(await redeem(signedUp, network(2)), 201)
  t.equal(await redeem(refused, network(2)), 201)
  t.equal(await redeem({ ...refused, sms_code: await issueCode(refused.mobile) }, network(2)), 409)
  const withTicket = await requestCode(usedTicket)
  t.equal(await redeem(withTicket), 201)
  for (const { mobile } of [unknown, signedUp, refused, withTicket]) {
    const body = { ...unknown, mobile }
    for (let n = 0; n < 5; n++) t.equal(await guess(body, network(3)), 422)
    const reply = await api.signUp({ ...body, sms_code: wrongCode }, { from: network(3) })
    const seconds = Number(reply.headers['retry-after'])
    t.equal(reply.statusCode, 429)
    t.ok(seconds > 570 && seconds <= 600, `${seconds} s`)
    t.ok((await redis.ttl(guessesKey(mobile))) <= 600, 'what strangers have stored is gone after ten minutes')
  }
})

t.test('G8: a request in flight has not used its code, so wrong codes count for the whole hour', async (t) => {
  const body = await signUpBody()
  const inserts = await holdInserts(t)
  const first = api.signUp(body, { from: network(2) })
  await inserts.arrived(1)
  for (let n = 0; n < 5; n++) t.equal(await guess(body), 422)
  const reply = await api.signUp(body, { from: network(1) })
  t.ok(Number(reply.headers['retry-after']) > 3_500)
  await inserts.release()
  t.equal((await first).statusCode, 201)
})

const wide = { SMS_CODE_ATTEMPTS: '1000', SMS_GUESS_DAILY_MAX: '0' }
const guessKeys = () => redis.keys('{sms_guesses}:*')
const countOf = (key: string) => redis.zcard(`{sms_guesses}:${key}`)

t.test('G8: over all mobiles, an address has 50 wrong codes in an hour, and all have 1000', async (t) => {
  const limits = { SMS_GUESS_IP_HOURLY_MAX: '50', SMS_GUESS_HOURLY_MAX: '1000' }
  const instances = [client(await build(t, limits)), client(await build(t, limits))]
  await redis.del('none', ...(await guessKeys()))
  const bodies = await Promise.all(Array.from({ length: 300 }, () => signUpBody()))
  const from = network(20_000)
  const statuses = await Promise.all(bodies.map((body, n) => guess(body, from, instances[n % 2])))
  t.strictSame([statuses.filter((s) => s === 422).length, statuses.filter((s) => s === 429).length], [50, 250])
  const [owner = await signUpBody()] = bodies
  for (const sms_code of [wrongCode, owner.sms_code]) {
    const reply = await api.signUp({ ...owner, sms_code }, { from: network(20_001) })
    t.equal(reply.statusCode, sms_code === wrongCode ? 422 : 201, 'another address has its own')
  }
  const refused = await signUpBody()
  for (const sms_code of [wrongCode, refused.sms_code]) {
    const reply = await instances[0]?.signUp({ ...refused, sms_code }, { from })
    t.equal(reply?.statusCode, 429, 'whether or not the code is right')
    const seconds = Number(reply?.headers['retry-after'])
    t.ok(seconds > 3_500 && seconds <= 3_600, `${seconds} s`)
  }
  t.equal(await redis.get(`sms_code_${refused.mobile}`), refused.sms_code, 'the code is untouched')
  t.strictSame(await redis.keys(`{sms_code_${refused.mobile}}*`), [], 'and nothing else tells what was presented')
  t.equal(await redeem(await requestCode(), from, instances[0]), 201, 'a request with a ticket has no such limit')

  // 20 more addresses spend what all have.
  const others = await Promise.all(
    Array.from({ length: 1_000 }, async (_, n) =>
      guess(bodies[n % 300] ?? owner, network(20_100 + (n % 25)), instances[n % 2])
    )
  )
  t.equal(others.filter((status) => status === 422).length, 950)
  t.equal(await redeem(refused, network(20_999), instances[0]), 429)
  t.equal(await countOf('all'), 1_000)
  await redis.del(await guessKeys())
  t.equal(await redeem(refused, network(20_999), instances[0]), 201, 'after the hour')
})

t.test(
  'a right code costs nothing, and each that is used gives a unit back: honest people pass, however many',
  async (t) => {
    const limits = { SMS_GUESS_IP_HOURLY_MAX: '5', SMS_GUESS_HOURLY_MAX: '6' }
    const limited = client(await build(t, { ...wide, ...limits }))
    const failing = client(await buildFailing(t, { ...wide, ...limits }))
    await redis.del('none', ...(await guessKeys()))
    const from = network(21_000)
    const networkKey = `network:${from}`
    const counts = () => Promise.all([countOf(networkKey), countOf('all')])

    // Everybody mistypes once, also several at a time.
    for (let n = 0; n < 20; n++) {
      const body = await signUpBody()
      t.equal(await guess(body, from, limited), 422)
      t.equal(await redeem(body, from, limited), 201)
    }
    const crowd = await Promise.all(Array.from({ length: 60 }, () => signUpBody()))
    const replies = await Promise.all(crowd.map((body) => redeem(body, from, limited)))
    t.ok(
      replies.every((status) => status === 201),
      'right codes that arrive together'
    )
    t.strictSame(await counts(), [0, 0])

    const spare = await signUpBody()
    for (let n = 0; n < 4; n++) t.equal(await guess(spare, from, limited), 422)
    t.strictSame(await counts(), [4, 4])
    t.equal(await redeem(spare, from, failing), 500)
    t.strictSame(await counts(), [4, 4], 'a code that is not used gives nothing back')
    t.equal(await redeem(spare, from, limited), 201)
    t.strictSame(await counts(), [3, 3])
    t.equal(await redeem(spare, from, limited), 201)
    t.strictSame(await counts(), [3, 3], 'nor does a repeat of a used one')
    t.equal(await redeem({ ...spare, sms_code: await issueCode(spare.mobile) }, from, limited), 409)
    t.strictSame(await counts(), [3, 3])
    t.equal(
      (await limited.resetPassword({ ...spare, sms_code: await issueCode(spare.mobile) }, { from })).statusCode,
      200
    )
    t.strictSame(await counts(), [2, 2])
    t.equal(await redeem(await signUpBody(), network(21_001), limited), 201)
    t.strictSame(await counts(), [2, 1], 'to the network that has used it')

    t.equal((await limited.signUp({ ...spare, sms_code: '12345' }, { from })).statusCode, 422)
    const owner = await requestCode(newMobile(), limited)
    for (let n = 0; n < 2; n++) t.equal(await guess(owner, from, limited), 422)
    t.strictSame(await counts(), [2, 1], 'what cannot be a code and a wrong code with a ticket cost nothing')
  }
)

t.test('an outage counts no wrong code over all mobiles', async (t) => {
  const proxy = await openProxy(t, 'REDIS_URL')
  const limited = client(await build(t, { REDIS_URL: proxy.url }))
  await redis.del('none', ...(await guessKeys()))
  const body = await signUpBody()
  proxy.strike(claimKey(body.mobile), { kind: 'reset' })
  t.equal(await guess(body, network(1), limited), 503)
  t.strictSame(await guessKeys(), [])
})

t.test(
  'G8: a stranger who asks for the other purpose, again and again, leaves every code of the owner usable',
  async (t) => {
    const webhook = await startWebhook(t)
    const api = client(await build(t, { ...unlimitedSms, SMS_RESEND_S: '60', SMS_WEBHOOK_URL: webhook.url }))
    for (let round = 0; round < 4; round++) {
      const body = await signUpBody()
      const { mobile } = body
      await redis.del(`sms_code_${mobile}`)
      const stranger = () => api.sendCode(mobile, { purpose: 'password', from: network(30_000) })
      const owner = () => api.sendCode(mobile, { purpose: 'sign_up' })
      const minutePasses = () => redis.del(`send_sms_code_${mobile}`)
      const first = round % 2 === 0 ? [stranger, owner] : [owner, stranger]
      for (const ask of first) await ask()
      await minutePasses()
      // The stranger asks again in the second half of the life, so a new code replaces the one that the owner has asked for.
      if (round > 1) await redis.pexpire(`sms_code_${mobile}`, 140_000)
      await stranger()
      const sms_code = webhook.received.at(-1)?.code
      t.equal((await api.resetPassword({ ...body, sms_code: wrongCode }, { from: network(30_000) })).statusCode, 422)
      t.equal((await api.signUp({ ...body, sms_code }, { from: network(1) })).statusCode, 201, `round ${round}`)
    }
  }
)

t.test('a right code for a purpose for which nobody has asked is 422 and costs no try', async (t) => {
  const mobile = newMobile()
  const { ticket } = (await api.sendCode(mobile, { purpose: 'password' })).json().data
  const body = {
    ...(await signUpBody({ mobile: newMobile() })),
    mobile,
    sms_code: await redis.get(`sms_code_${mobile}`)
  }
  for (let n = 0; n < 7; n++) {
    t.equal((await api.signUp(body)).statusCode, 422)
    t.equal((await api.signUp({ ...body, ticket })).statusCode, 422)
  }
  t.equal(await redis.exists(guessesKey(mobile)), 0)
})

t.test('G5: a code in another dress is the code, also in a repeat', async (t) => {
  const mobile = newMobile()
  await api.sendCode(mobile)
  const sms_code = `${await redis.get(`sms_code_${mobile}`)}`
  const body = { ...(await signUpBody({ mobile: newMobile() })), mobile }
  const fullWidth = sms_code.replace(/\d/g, (digit) => String.fromCharCode(digit.charCodeAt(0) + 0xfee0))
  t.equal((await api.signUp({ ...body, sms_code: '12345' })).statusCode, 422)
  for (const [dress, replayed] of [
    [fullWidth, undefined],
    [sms_code, 'true'],
    [`${sms_code.slice(0, 3)} ${sms_code.slice(3)}`, 'true'],
    [`${sms_code}\n${sms_code}`, 'true']
  ]) {
    const reply = await api.signUp({ ...body, sms_code: dress })
    t.strictSame([reply.statusCode, reply.headers['idempotent-replayed']], [201, replayed])
  }
})

t.test(
  'G8: new codes, failed messages and failed sign-ups give no guesses back; a success gives all back',
  async (t) => {
    const webhook = await startWebhook(t)
    const sender = client(await build(t, { ...unlimitedSms, SMS_WEBHOOK_URL: webhook.url }))
    const failing = client(await buildFailing(t))
    const body = await signUpBody()
    const { mobile } = body
    t.equal(await guess(body), 422)
    t.equal(await redeem(body, network(2), failing), 500, 'held and released')
    t.equal(await guess(body), 422)
    await sender.sendCode(mobile)
    t.equal(await guess(body), 422)
    webhook.answer = answerWith(400)
    t.equal((await sender.sendCode(mobile, { purpose: 'sign_up' })).statusCode, 503)
    t.equal(await guess(body), 422)
    webhook.answer = answerWith(500)
    t.equal((await sender.sendCode(mobile, { purpose: 'password' })).statusCode, 503)
    t.equal(await guess(body), 422)
    t.equal(await guess(body), 429)

    const owner = { ...body, sms_code: await issueCode(mobile) }
    t.equal(await redeem(owner, network(3)), 201)
    t.equal(await redis.exists(guessesKey(mobile)), 0)
  }
)

t.test('G8: codes whose messages fail for certain cannot be guessed without bound', async (t) => {
  const webhook = await startWebhook(t)
  const attacked = client(
    await build(t, {
      ...unlimitedSms,
      SMS_RESEND_S: '60',
      SMS_DAILY_MAX: '10',
      SMS_WEBHOOK_URL: webhook.url
    })
  )
  const body = await signUpBody()
  const statuses: number[] = []
  for (let n = 0; n < 200; n++) {
    // The code is guessed while its message is on the way: the refusal withdraws it.
    webhook.answer = async (...args) => {
      statuses.push(await guess(body, network(n), attacked))
      answerWith(400)(...args)
    }
    const sent = await attacked.sendCode(body.mobile, { from: network(n) })
    t.equal(sent.json().data, undefined, 'no ticket')
  }
  t.equal(statuses.length, 200)
  t.equal(statuses.filter((status) => status === 422).length, 50)
})

t.test('a code for one purpose is a wrong code for the other, and its purpose survives a failure', async (t) => {
  const failing = client(await buildFailing(t))
  const registered = await signUpBody()
  t.equal(await redeem(registered), 201)
  const { mobile } = registered
  for (const [purpose, request, other, success] of [
    ['password', api.resetPassword, api.signUp, 200],
    ['sign_up', api.signUp, api.resetPassword, 409]
  ] as const) {
    await api.sendCode(mobile, { purpose })
    const body = { ...registered, sms_code: `${await redis.get(`sms_code_${mobile}`)}` }
    t.equal((await other(body)).statusCode, 422)
    t.equal((await (purpose === 'sign_up' ? failing.signUp : failing.resetPassword)(body)).statusCode, 500)
    t.equal((await other(body)).statusCode, 422, 'after a failure')
    t.equal((await request(body)).statusCode, success)
  }
  await api.sendCode(mobile, { purpose: 'sign_up' })
  const foreign = { ...registered, sms_code: await issueCode(mobile) }
  t.equal((await api.resetPassword(foreign)).statusCode, 200, 'a code of another service is for both')
})

type Step =
  | { kind: 'guess'; from: number; instance: number }
  | { kind: 'guess with ticket'; ticket: number; instance: number }
  | { kind: 'send' | 'send fails for certain' | 'send may have failed'; purpose: 'sign_up' | 'password' }
  | { kind: 'fail' | 'succeed'; from: number }
  | { kind: 'an hour passes' }

const instance = fc.nat(1)
const step: fc.Arbitrary<Step> = fc.oneof(
  { weight: 8, arbitrary: fc.record({ kind: fc.constant('guess'), from: fc.nat(4), instance }) },
  { weight: 4, arbitrary: fc.record({ kind: fc.constant('guess with ticket'), ticket: fc.nat(3), instance }) },
  {
    weight: 2,
    arbitrary: fc.record({
      kind: fc.constantFrom('send', 'send fails for certain', 'send may have failed'),
      purpose: fc.constantFrom('sign_up', 'password')
    })
  },
  fc.record({ kind: fc.constantFrom('fail', 'succeed'), from: fc.nat(4) }),
  fc.record({ kind: fc.constant('an hour passes') })
)

t.test(
  'G8: no steps of two instances exceed a budget, and a ticket is refused only for its own wrong codes',
  async (t) => {
    const [perGuesser, perDay] = [3, 8]
    const webhook = await startWebhook(t)
    const env = {
      ...unlimitedSms,
      SMS_CODE_ATTEMPTS: `${perGuesser}`,
      SMS_GUESS_DAILY_MAX: `${perDay}`,
      SMS_WEBHOOK_URL: webhook.url
    }
    const instances = [client(await build(t, env)), client(await build(t, env))] as const
    const failing = client(await buildFailing(t, env))

    await fc.assert(
      fc.asyncProperty(fc.array(step, { minLength: 10, maxLength: 40, size: 'max' }), async (steps) => {
        const mobile = `1${randomInt(3_000_000_000, 10_000_000_000)}`
        const body = { mobile, sms_code: wrongCode, password: 'correct horse', password2: 'correct horse' }
        await redis.set(`sms_code_${mobile}`, 'right', 'EX', 300)
        const tickets: string[] = []
        const guesses = new Map<string, number>()
        let guessesOfAll = 0
        const isSpent = (guesser: string) => (guesses.get(guesser) ?? 0) >= perGuesser
        const count = (guesser: string) => guesses.set(guesser, (guesses.get(guesser) ?? 0) + 1)

        for (const step of steps) {
          switch (step.kind) {
            case 'guess': {
              const from = network(step.from)
              const isRefused = isSpent(from) || guessesOfAll >= perDay
              const reply = await instances[step.instance]?.signUp(body, { from })
              assert.equal(reply?.statusCode, isRefused ? 429 : 422)
              if (isRefused) break
              count(from)
              guessesOfAll++
              break
            }
            case 'guess with ticket': {
              const ticket = tickets[step.ticket % Math.max(1, tickets.length)]
              if (ticket === undefined) break
              const reply = await instances[step.instance]?.signUp({ ...body, ticket }, { from: network(0) })
              assert.equal(reply?.statusCode, isSpent(ticket) ? 429 : 422)
              if (!isSpent(ticket)) count(ticket)
              break
            }
            case 'fail':
            case 'succeed': {
              const from = network(step.from)
              const code = await findCode()
              if (code === undefined) break
              const isRefused = isSpent(from) || guessesOfAll >= perDay
              const [{ signUp }, status] = step.kind === 'succeed' ? [instances[1], 201] : [failing, 500]
              const reply = await signUp({ ...body, sms_code: code }, { from })
              assert.equal(reply.statusCode, isRefused ? 429 : status)
              if (reply.statusCode !== 201) break
              // Only a success gives the guesses back. The next steps are about a new user of the mobile.
              guesses.clear()
              guessesOfAll = 0
              await postgres.query('DELETE FROM users WHERE mobile = $1', [mobile])
              await redis.set(`sms_code_${mobile}`, 'right', 'EX', 300)
              break
            }
            case 'an hour passes':
              await ageGuesses(mobile, 3_600)
              guesses.clear()
              // Tickets have expired by then.
              tickets.length = 0
              break
            default: {
              const status = { send: 200, 'send fails for certain': 404, 'send may have failed': 500 }[step.kind]
              webhook.answer = answerWith(status)
              const reply = await instances[0]?.sendCode(mobile, { purpose: step.purpose })
              assert.equal(reply?.statusCode, status === 200 ? 202 : 503)
              if (status === 200) tickets.push(`${reply?.json().data.ticket}`)
              // Successes for others keep the circuit breaker closed.
              webhook.answer = accept
              for (let n = 0; status === 500 && n < 2; n++) await instances[0]?.sendCode(newMobile())
            }
          }
        }

        /** Returns the code with which a sign-up succeeds, from where the service keeps it, or undefined. */
        async function findCode(): Promise<string | undefined> {
          const [code, issue, claim] = await redis.mget(
            `sms_code_${mobile}`,
            `{sms_code_${mobile}}:issue`,
            claimKey(mobile)
          )
          const { purposes, code: issued } = JSON.parse(issue ?? '{}')
          if (code !== null && (issued !== code || purposes.sign_up)) return code
          return JSON.parse(claim ?? '{}').code
        }
      }),
      { numRuns: 60 }
    )
  }
)

t.test(
  'G8: what a stranger with 1,000 addresses reaches against one mobile in a day, by the clock of the test',
  async (t) => {
    const webhook = await startWebhook(t)
    const production = { SMS_GUESS_IP_HOURLY_MAX: '50', SMS_GUESS_HOURLY_MAX: '1000', SMS_WEBHOOK_URL: webhook.url }
    await redis.flushall()
    const { app, pass } = await withMovedClock(t, redis, () => build(t, production))
    const stranger = client(app)
    const mobile = newMobile()
    const body = { ...(await signUpBody({ mobile: newMobile() })), mobile }
    const reached = { messages: 0, withTicket: 0, withoutTicket: 0, ofOneAddress: 0 }
    const wrongCodeFor = (code: string | null) => (code === wrongCode ? '111111' : wrongCode)
    let address = 0
    for (let minute = 0; minute < 24 * 60; minute += 5) {
      const sent = await stranger.sendCode(mobile, { from: network(address++ % 1_000) })
      const sms_code = wrongCodeFor(await redis.get(`sms_code_${mobile}`))
      if (sent.statusCode === 202) {
        reached.messages++
        const { ticket } = sent.json().data
        for (let n = 0; n < 7; n++) {
          if ((await stranger.signUp({ ...body, sms_code, ticket })).statusCode === 422) reached.withTicket++
        }
      }
      // One address tries again and again, and the others in turn.
      if ((await stranger.signUp({ ...body, sms_code }, { from: network(0) })).statusCode === 422)
        reached.ofOneAddress++
      for (let n = 0; n < 3; n++) {
        if (
          (await stranger.signUp({ ...body, sms_code }, { from: network(1 + (address++ % 999)) })).statusCode === 422
        ) {
          reached.withoutTicket++
        }
      }
      await pass(300)
    }
    reached.withoutTicket += reached.ofOneAddress
    t.comment(`in a day: ${JSON.stringify(reached)}`)
    t.equal(reached.messages, 10, 'SMS_DAILY_MAX')
    t.equal(reached.withTicket, 50, '5 for each of 10 tickets')
    t.equal(reached.withoutTicket, 50, 'SMS_GUESS_DAILY_MAX')
    t.equal(webhook.received.length, 10)
    // The next day begins: the clock of the test is that of the limits, too.
    t.equal((await stranger.sendCode(mobile, { from: network(5) })).statusCode, 202)
    t.equal(await guess(body, network(2_000), stranger), 422)
  }
)
