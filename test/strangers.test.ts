import t from 'tap'
import { client, statusAndErrno } from '../testkit/client.js'
import { withMovedClock } from '../testkit/moved-clock.js'
import { answerWith, startWebhook, unlimitedSms } from '../testkit/sms-webhook.js'
import { startTestbed } from '../testkit/testbed.js'

/*
 * G8: nobody guesses a code or blocks its owner. test/sms-codes.test.ts and test/logins.test.ts have the limits on messages and
 * logins, test/limits.test.ts the numbers of all.
 */

const testbed = await startTestbed(t)
const { build, buildWithLog, buildHashingAfter, holdInserts } = testbed
const { issueCode, newMobile, redis, signUpBody, stores, tokenOf } = testbed

const webhook = await startWebhook(t)
const { answers } = webhook
const codeSentTo = (mobile: string) => `${webhook.received.findLast((message) => message.mobile === mobile)?.code}`

const sessionSecret = stores.environment.SESSION_SECRET ?? ''
const newerSecret = 'a newer secret of thirty-two characters'
const unlimited = { ...unlimitedSms, SMS_WEBHOOK_URL: webhook.url }
const overAll = { SMS_GUESS_IP_HOURLY_MAX: '50', SMS_GUESS_HOURLY_MAX: '1000' }

const api = client(await build(t, unlimited))
/** Another instance, after a rotation of the secret. */
const rotated = client(await build(t, { ...unlimited, SESSION_SECRET: `${newerSecret},${sessionSecret}` }))
/** One whose hashes fail, so each right code is held and released unused. */
const failing = client(await buildHashingAfter(t, () => Promise.reject(new Error('no memory for a hash')), unlimited))
/** An application with production's limits on messages to a mobile. */
const paced = client(await build(t, { ...unlimited, SMS_RESEND_S: '60', SMS_DAILY_MAX: '10' }))
/** Two applications with production's limits on wrong codes over all mobiles. */
const limited = [client(await build(t, overAll)), client(await build(t, overAll))] as const

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
async function requestCode(mobile = newMobile()): Promise<Body> {
  const body = await signUpBody({ mobile })
  const { ticket } = (await api.sendCode(mobile)).json().data
  return { ...body, sms_code: codeSentTo(mobile), ticket }
}

const ticketOf = (mobile: string, ageSeconds: number, secret?: string) => tokenOf('ticket', mobile, ageSeconds, secret)

/** Makes the windows of all budgets of a mobile end earlier. */
async function ageGuesses(mobile: string, seconds: number): Promise<void> {
  for (const [field, value] of Object.entries(await redis.hgetall(guessesKey(mobile)))) {
    const [count, end] = value.split(' ')
    await redis.hset(guessesKey(mobile), field, `${count} ${Number(end) - seconds * 1_000}`)
  }
}

const count = (statuses: number[], status: number) => statuses.filter((other) => other === status).length

t.test('G8: a wrong code leaves the code; the sixth of a network in an hour is 429, also a right one', async (t) => {
  const body = await signUpBody()
  for (let n = 0; n < 4; n++) t.equal(await guess(body), 422)
  await ageGuesses(body.mobile, 1_800)
  t.equal(await guess(body), 422)
  for (const sms_code of [wrongCode, body.sms_code]) {
    const reply = await api.signUp({ ...body, sms_code }, { from: network(1) })
    t.strictSame(statusAndErrno(reply), [429, '4201'])
    const seconds = Number(reply.headers['retry-after'])
    t.ok(seconds > 1_700 && seconds <= 1_800, `${seconds} s of an hour from the first`)
  }
  t.equal(await redis.get(`sms_code_${body.mobile}`), body.sms_code)
  await ageGuesses(body.mobile, 1_800)
  t.equal(await redeem(body), 201, 'after the hour')
})

t.test('G8: tries are counted before a code is looked at, so parallel guesses do not slip through', async (t) => {
  const body = await signUpBody()
  const statuses = await Promise.all(
    Array.from({ length: 60 }, (_, n) => guess(body, network(1), n % 2 ? api : rotated))
  )
  t.strictSame([count(statuses, 422), count(statuses, 429)], [5, 55])
})

t.test('G8: nobody can block the holder of a ticket, who has five tries of their own, on every instance', async (t) => {
  const body = await requestCode()
  const { ticket: _, ...withoutTicket } = body
  for (let n = 0; n < 60; n++) await guess(withoutTicket, network(n >> 2))
  t.equal(await redeem(withoutTicket, network(999)), 429, 'all without a ticket are refused')
  for (let n = 0; n < 4; n++) t.equal(await guess(body, network(1), n % 2 ? api : rotated), 422)
  t.equal(await redeem(body), 201)

  const other = await requestCode()
  for (let n = 0; n < 5; n++) t.equal(await guess(other), 422)
  t.equal(await redeem(other, network(7)), 429, 'from any network')
  t.equal(await redeem(other, network(7), rotated), 429, 'also after a rotation of SESSION_SECRET')
  const { ticket: spent, ...owner } = other
  t.equal(await redeem(owner), 201, 'the tries of a ticket are not those of its network')
})

t.test('G8: a forged or expired ticket, or one for another mobile, counts as absent', async (t) => {
  const body = await requestCode()
  const [id, expiry, mac = ''] = `${body.ticket}`.split('.')
  const forged = [
    ...[`x${body.ticket}`, `${id}.zzzzzzzzz.${mac}`, `${id}.${expiry}.${mac}AA`, `${id}.${expiry}.${mac.slice(2)}`],
    ...[`${id}.${expiry}.${mac.startsWith('A') ? 'B' : 'A'}${mac.slice(1)}`, `${id}.${expiry}.`, `${id}`, '', '.'],
    ...[ticketOf(newMobile(), 0), ticketOf(body.mobile, 0, newerSecret), ticketOf(body.mobile, 3_601)]
  ]
  for (const [n, ticket] of forged.entries()) {
    t.equal(await guess({ ...body, ticket }, network(n)), 422)
    t.equal(await redis.hexists(guessesKey(body.mobile), network(n)), 1, 'the network is counted')
  }
  const valid = [`${body.ticket}`, ticketOf(body.mobile, 3_540)]
  for (const ticket of valid) t.equal(await guess({ ...body, ticket }), 422)
  t.equal(await guess({ ...body, ticket: ticketOf(body.mobile, 0, newerSecret) }, network(1), rotated), 422)
  const guessers = await redis.hkeys(guessesKey(body.mobile))
  for (const ticket of valid) t.ok(guessers.includes(`ticket:${ticket.split('.')[0]}`), 'a valid one is counted itself')
  t.equal(guessers.length, forged.length + 1 + 3)

  for (const ticket of [null, 1, {}, 'x'.repeat(257)]) {
    const reply = await api.signUp({ ...body, ticket })
    t.strictSame([reply.statusCode, reply.json().errmsg], [400, '参数错误'])
  }
  t.equal((await api.signUp({ ...body, ticket: 'x'.repeat(256) })).statusCode, 201)
})

t.test('G8: all without a ticket have SMS_GUESS_DAILY_MAX wrong codes for a mobile in a day', async (t) => {
  const body = await signUpBody()
  for (let n = 0; n < 50; n++) t.equal(await guess(body, network(n % 10)), 422)
  // One that has spent its own tries, too, and one that has not: the longest window counts.
  for (const from of [network(1), network(50)]) {
    const reply = await api.signUp(body, { from })
    t.equal(reply.statusCode, 429)
    t.ok(Number(reply.headers['retry-after']) > 86_000)
  }
  await ageGuesses(body.mobile, 86_400)
  t.equal(await redeem(body, network(50)), 201)
})

t.test('G8: an IPv6 /64 is a guesser, and a /48 has four times the number', async (t) => {
  const body = await signUpBody()
  for (let n = 0; n < 5; n++) t.equal(await guess(body, `2001:db8:1:1::${n}`), 422)
  t.equal(await guess(body, '2001:db8:1:1::9'), 429)
  for (let n = 5; n < 20; n++) t.equal(await guess(body, `2001:db8:1:${2 + (n % 5)}::${n}`), 422)
  t.equal(await guess(body, '2001:db8:1:99::1'), 429)
  t.equal(await redeem(body, '2001:db8:2::1'), 201)
})

t.test('G8: neither the answers to guesses nor Retry-After tell that a mobile has just signed up', async (t) => {
  const release = async (body: Body) => t.equal(await redeem(body, network(2), failing), 500)
  const use = async (body: Body) => t.equal(await redeem(body, network(2)), 201)
  let finish = async () => undefined as unknown
  const nothingToGuess: Record<string, (body: Body) => unknown> = {
    'no code': ({ mobile }) => redis.del(`sms_code_${mobile}`),
    'a used code': use,
    'a used code of ours': async ({ mobile }) => use(await requestCode(mobile)),
    'a code used in vain': async (body) => {
      await use(body)
      t.equal(await redeem({ ...body, sms_code: await issueCode(body.mobile) }, network(2)), 409)
    }
  }
  const guessable: Record<string, (body: Body) => unknown> = {
    'a code': () => undefined,
    'a code that was released': release,
    'a code of ours that was released': async ({ mobile }) => release(await requestCode(mobile)),
    'a code that came after the first guess': async (body) => {
      await redis.del(`sms_code_${body.mobile}`)
      t.equal(await guess(body, network(4)), 422)
      await issueCode(body.mobile)
    },
    'a code that a request holds': async (body) => {
      const inserts = await holdInserts(t)
      const reply = api.signUp(body, { from: network(2) })
      await inserts.arrived(1)
      finish = () => inserts.release().then(() => reply)
    }
  }
  for (const [states, refusedSeconds] of [
    [nothingToGuess, 600],
    [guessable, 3_600]
  ] as const) {
    for (const [name, prepare] of Object.entries(states)) {
      const body = await signUpBody()
      await prepare(body)
      for (let n = 0; n < 5; n++) t.equal(await guess(body, network(3)), 422)
      const reply = await api.signUp({ ...body, sms_code: wrongCode }, { from: network(3) })
      const seconds = Number(reply.headers['retry-after'])
      t.equal(reply.statusCode, 429)
      t.ok(seconds > refusedSeconds - 30 && seconds <= refusedSeconds, `${name}: ${seconds} s`)
      if (refusedSeconds === 600) t.ok((await redis.ttl(guessesKey(body.mobile))) <= 600, 'the guesses are gone then')
    }
  }
  t.match(await finish(), { statusCode: 201 })
})

t.test('G8: over all mobiles, an address has 50 wrong codes in an hour, and all have 1000', async (t) => {
  const from = network(20_000)
  const bodies = await Promise.all(Array.from({ length: 150 }, () => signUpBody()))
  const guesses = await Promise.all(bodies.map((body, n) => guess(body, from, limited[n % 2])))
  t.strictSame([count(guesses, 422), count(guesses, 429)], [50, 100])
  const refused = await signUpBody()
  for (const sms_code of [wrongCode, refused.sms_code]) {
    const reply = await limited[0].signUp({ ...refused, sms_code }, { from })
    t.equal(reply.statusCode, 429, 'whether or not the code is right')
    const seconds = Number(reply.headers['retry-after'])
    t.ok(seconds > 3_500 && seconds <= 3_600, `${seconds} s`)
  }
  t.equal(await redis.get(`sms_code_${refused.mobile}`), refused.sms_code, 'the code is untouched')
  t.strictSame(await redis.keys(`{sms_code_${refused.mobile}}*`), [], 'and nothing else tells what was presented')
  t.equal(await redeem(await requestCode(), from, limited[0]), 201, 'a request with a ticket has no such limit')
  t.equal(await redeem(await signUpBody(), network(20_001), limited[0]), 201, 'another address has its own')

  // Others have spent most of what all have. 150 requests from 15 addresses race for the rest.
  const spent = await redis.zcard('{sms_guesses}:all')
  const units = Array.from({ length: 980 - spent }, (_, n) => [Date.now(), `of others ${n}`])
  await redis.zadd('{sms_guesses}:all', ...units.flat())
  const others = await Promise.all(bodies.map((body, n) => guess(body, network(20_100 + (n % 15)), limited[n % 2])))
  t.equal(count(others, 422), 20)
  t.equal(await redeem(refused, network(20_999), limited[0]), 429)
  t.equal(await redis.zcard('{sms_guesses}:all'), 1_000)
  await redis.del(await redis.keys('{sms_guesses}:*'))
  t.equal(await redeem(refused, network(20_999), limited[0]), 201, 'after the hour')
})

t.test('G8: each code that is used gives a wrong one back, so honest people pass, however many', async (t) => {
  const from = network(21_000)
  const counts = () => Promise.all([`network:${from}`, 'all'].map((key) => redis.zcard(`{sms_guesses}:${key}`)))
  await redis.del('none', ...(await redis.keys('{sms_guesses}:*')))
  // Everybody mistypes once, many at a time.
  for (let round = 0; round < 2; round++) {
    const crowd = await Promise.all(Array.from({ length: 45 }, () => signUpBody()))
    for (const [present, status] of [
      [guess, 422],
      [redeem, 201]
    ] as const) {
      const statuses = await Promise.all(crowd.map((body, n) => present(body, from, limited[n % 2])))
      t.equal(count(statuses, status), 45)
    }
  }
  t.strictSame(await counts(), [0, 0])

  const body = await signUpBody()
  const withNewCode = async () => ({ ...body, sms_code: await issueCode(body.mobile) })
  const reset = async () => (await limited[0].resetPassword(await withNewCode(), { from })).statusCode
  for (let n = 0; n < 4; n++) t.equal(await guess(body, from, limited[0]), 422)
  for (const [name, send, status, expected] of [
    ['a code that is not used gives nothing back', () => redeem(body, from, failing), 500, [4, 4]],
    ['one that is used does', () => redeem(body, from, limited[0]), 201, [3, 3]],
    ['a repeat does not', () => redeem(body, from, limited[0]), 201, [3, 3]],
    ['nor does a code used in vain', async () => redeem(await withNewCode(), from, limited[0]), 409, [3, 3]],
    ['a reset does', reset, 200, [2, 2]],
    ['to its own network', async () => redeem(await signUpBody(), network(21_001), limited[0]), 201, [2, 1]],
    ['a wrong code with a ticket costs nothing', async () => guess(await requestCode(), from, limited[0]), 422, [2, 1]]
  ] as const) {
    t.equal(await send(), status, name)
    t.strictSame(await counts(), expected, name)
  }
})

t.test('G8: new codes and failures of every kind give no guesses back; a success gives all back', async (t) => {
  const body = await signUpBody()
  const { mobile } = body
  for (const event of [
    () => redeem(body, network(2), failing),
    () => api.sendCode(mobile),
    () => {
      answers.set(mobile, answerWith(400))
      return api.sendCode(mobile, { purpose: 'sign_up' })
    },
    () => {
      answers.set(mobile, answerWith(500))
      return api.sendCode(mobile, { purpose: 'password' })
    },
    () => undefined
  ]) {
    t.equal(await guess(body), 422)
    await event()
  }
  t.equal(await guess(body), 429)
  t.equal(await redeem({ ...body, sms_code: await issueCode(mobile) }, network(3)), 201)
  t.equal(await redis.exists(guessesKey(mobile)), 0)
})

t.test('G8: codes whose messages fail for certain cannot be guessed without bound', async (t) => {
  const body = await signUpBody()
  const statuses: number[] = []
  for (let n = 0; n < 70; n++) {
    // The code is guessed while its message is on the way: the refusal withdraws it.
    answers.set(body.mobile, async (...args) => {
      statuses.push(await guess(body, network(n), paced))
      answerWith(400)(...args)
    })
    const sent = await paced.sendCode(body.mobile, { from: network(n) })
    t.equal(sent.json().data, undefined, 'no ticket')
  }
  t.strictSame([count(statuses, 422), count(statuses, 429)], [50, 20])
})

t.test('G8: a stranger who asks for another purpose leaves every code of the owner usable', async (t) => {
  for (let round = 0; round < 4; round++) {
    const body = await signUpBody()
    const { mobile } = body
    await redis.del(`sms_code_${mobile}`)
    const stranger = () => paced.sendCode(mobile, { purpose: 'password', from: network(30_000) })
    const owner = () => paced.sendCode(mobile, { purpose: 'sign_up' })
    for (const ask of round % 2 === 0 ? [stranger, owner] : [owner, stranger]) await ask()
    await redis.del(`send_sms_code_${mobile}`)
    // The stranger asks again in the second half of the life, so a new code replaces the one that the owner has asked for.
    if (round > 1) await redis.pexpire(`sms_code_${mobile}`, 140_000)
    await stranger()
    const sms_code = codeSentTo(mobile)
    t.equal((await paced.resetPassword({ ...body, sms_code: wrongCode }, { from: network(30_000) })).statusCode, 422)
    t.equal((await paced.signUp({ ...body, sms_code }, { from: network(1) })).statusCode, 201, `round ${round}`)
  }
})

t.test('G5, G8: a code as people type it is the code, and what cannot be one costs nothing', async (t) => {
  const body = await requestCode()
  const code = body.sms_code
  for (const text of ['12345', '1234567', 'abcdef', '１２３', '123456123457', ' ']) {
    t.equal((await api.signUp({ ...body, sms_code: text })).statusCode, 422, text)
  }
  const fullWidth = code.replace(/\d/g, (digit) => String.fromCharCode(digit.charCodeAt(0) + 0xfee0))
  for (const [text, replayed] of [
    [fullWidth, undefined],
    [code, 'true'],
    [`${code.slice(0, 3)} ${code.slice(3)}`, 'true'],
    [`${code}\n${code}`, 'true']
  ]) {
    const reply = await api.signUp({ ...body, sms_code: text })
    t.strictSame([reply.statusCode, reply.headers['idempotent-replayed']], [201, replayed])
  }
  t.equal((await api.signUp({ ...body, sms_code: '12345' })).statusCode, 422, 'a used code')
  t.equal(await redis.exists(guessesKey(body.mobile)), 0)
})

t.test('G8: in production a limit that is turned off is named at the start', async (t) => {
  const production = {
    NODE_ENV: 'production',
    SMS: 'off',
    TRUST_PROXY: 'none',
    HASH_MEMORY_KIB: '7168',
    HASH_PASSES: '5'
  }
  const off = { SMS_GUESS_DAILY_MAX: '0', LOGIN_IP_HOURLY_MAX: '0' }
  const { lines } = await buildWithLog(t, { ...production, ...off })
  const limits = lines.map((line) => line.limits).filter((limits) => limits !== undefined)
  t.strictSame(limits, [['SMS_GUESS_DAILY_MAX', 'LOGIN_IP_HOURLY_MAX']])
})

t.test('G8: what a stranger with 1,000 addresses reaches against one mobile in a day', async (t) => {
  await redis.flushall()
  const { app, pass } = await withMovedClock(t, redis, () => build(t, { ...overAll, SMS_WEBHOOK_URL: webhook.url }))
  const stranger = client(app)
  const mobile = newMobile()
  const body = { ...(await signUpBody({ mobile: newMobile() })), mobile }
  const reached = { messages: 0, withTicket: 0, withoutTicket: 0 }
  let address = 0
  for (let minute = 0; minute < 24 * 60; minute += 10) {
    const sent = await stranger.sendCode(mobile, { from: network(address++ % 1_000) })
    const sms_code = (await redis.get(`sms_code_${mobile}`)) === wrongCode ? '111111' : wrongCode
    if (sent.statusCode === 202) {
      reached.messages++
      const { ticket } = sent.json().data
      for (let n = 0; n < 7; n++) {
        if ((await stranger.signUp({ ...body, sms_code, ticket })).statusCode === 422) reached.withTicket++
      }
    }
    // One address tries again and again, and the others in turn.
    for (const n of [0, 1 + (address++ % 999), 1 + (address++ % 999)]) {
      const { statusCode } = await stranger.signUp({ ...body, sms_code }, { from: network(n) })
      if (statusCode === 422) reached.withoutTicket++
    }
    await pass(600)
  }
  // SMS_DAILY_MAX; 5 for each of 10 tickets; SMS_GUESS_DAILY_MAX.
  t.strictSame(reached, { messages: 10, withTicket: 50, withoutTicket: 50 })
  // The next day begins: the clock of the test is that of the limits, too.
  t.equal((await stranger.sendCode(mobile, { from: network(5) })).statusCode, 202)
  t.equal(await guess(body, network(2_000), stranger), 422)
})
