import { randomUUID } from 'node:crypto'
import Fastify from 'fastify'
import t, { type Test } from 'tap'
import { type CodePurpose, createCodes, type Hold } from '#src/codes/codes.js'
import type { Config } from '#src/config/config.js'
import { InFlight } from '#src/http/in-flight.js'
import { Refusal } from '#src/outcomes.js'
import { createRateLimits, type LimitName } from '#src/stores/rate-limits.js'
import { openRedis } from '#src/stores/redis.js'
import { claimKey, leaseMsOf, startTestbed } from '../testkit/testbed.js'

/*
 * The life of a code: what each of the four scripts leaves in Redis, and what the next one finds. These tests call it without
 * a server. test/claims.test.ts sends requests.
 */

const { ageClaim, config, issueCode, newMobile, readClaim, redis } = await startTestbed(t)

const refusals: string[] = []
let usedCount = 0
const observer = {
  onRoundTrip: () => undefined,
  onHash: () => undefined,
  onCodeSent: () => undefined,
  onCodeUsed: () => usedCount++,
  onLimitReached: (limit: string) => refusals.push(limit)
}

const log = Fastify().log
/** Refunds that no request waits for. */
const inFlight = new InFlight()

async function buildCodes(t: Test, config: Config) {
  const app = Fastify()
  t.teardown(() => app.close())
  const redis = await openRedis(app, config, undefined)
  return createCodes(config, redis, createRateLimits(redis, undefined), inFlight, observer)
}

const codes = await buildCodes(t, config())

const [minute, day] = [60_000, 86_400_000]
const leaseMs = leaseMsOf(config())
const lifeMs = 5 * minute

/** How long a claim lives at least: 300 s, and two leases, so that a retry after the lease finds it. */
const claimTtlMs = Math.max(5 * minute, 2 * leaseMs)

/** How much of a TTL may have passed until a test reads it, on a busy machine. */
const slackMs = 30_000

const codeKey = (mobile: string) => `sms_code_${mobile}`
const issueKey = (mobile: string) => `{sms_code_${mobile}}:issue`
const guessesKey = (mobile: string) => `{sms_code_${mobile}}:guesses`
const keysOf = async (mobile: string) => (await redis.keys(`*${mobile}*`)).sort()
const readJson = async (key: string) => JSON.parse((await redis.get(key)) ?? 'null')

const address = '192.0.2.1'
/** Six digits, because what cannot be a code costs nothing. The codes of `issueCode` have letters. */
const wrong = '000000'
const newSend = () => ({ id: randomUUID(), network: address })
const issue = (mobile: string, purpose?: CodePurpose, send = newSend()) => codes.issue(mobile, purpose, send)

const present = (mobile: string, code: string, purpose: CodePurpose = 'sign_up', ip = address, by = codes) =>
  by.hold({ body: { mobile, sms_code: code }, ip, log }, purpose)

/** Presents a code that must be refused, and returns the outcome. */
const refusalOf = (...args: Parameters<typeof hold>): Promise<string> =>
  present(...args).then(
    (result) => (result === 'used_in_vain' ? result : 'held'),
    (error) => (error instanceof Refusal ? error.outcome : Promise.reject(error))
  )

/** Issues a code for a new mobile, and holds it. */
async function holdIssued(mobile = newMobile()) {
  const { code } = await issue(mobile)
  return { mobile, code, held: await hold(mobile, code) }
}

async function checkTtl(t: Test, key: string, ms: number): Promise<void> {
  const ttlMs = await redis.pttl(key)
  t.ok(ttlMs > ms - slackMs && ttlMs <= ms, `${key}: ${ttlMs} ms of ${ms} ms`)
}

/** What a hold has learnt of earlier requests. */
const learnt = ({ mayHaveWritten, usedBy }: Hold) => ({ mayHaveWritten, usedBy })

async function hold(...args: Parameters<typeof present>): Promise<Hold> {
  const result = await present(...args)
  if (result === 'used_in_vain') throw new Error('the code was used in vain')
  return result
}

t.test('a code is sent again while at least half of its life is left, and then serves every purpose', async (t) => {
  const mobile = newMobile()
  const [first, second, third] = [newSend(), newSend(), newSend()]
  const { code, ttlSeconds } = await issue(mobile, 'sign_up', first)
  t.match(code, /^\d{6}$/)
  t.equal(ttlSeconds, 300)
  t.equal(await redis.get(codeKey(mobile)), code)
  t.strictSame(await readJson(issueKey(mobile)), { code, purposes: { sign_up: true }, sends: [first] })
  for (const key of [codeKey(mobile), issueKey(mobile)]) await checkTtl(t, key, lifeMs)

  for (const key of [codeKey(mobile), issueKey(mobile)]) await redis.pexpire(key, 200_000)
  const again = await issue(mobile, 'password', second)
  t.equal(again.code, code)
  t.ok(again.ttlSeconds > 170 && again.ttlSeconds <= 200)
  for (const key of [codeKey(mobile), issueKey(mobile)]) await checkTtl(t, key, 200_000)
  t.equal((await issue(mobile, undefined, third)).code, code)
  const purposes = { sign_up: true, password: true, any: true }
  t.strictSame(await readJson(issueKey(mobile)), { code, purposes, sends: [first, second, third] })

  await redis.pexpire(codeKey(mobile), lifeMs / 2 - 1)
  const fourth = newSend()
  const newer = await issue(mobile, 'password', fourth)
  t.equal(newer.ttlSeconds, 300, 'a code in the second half of its life is replaced')
  t.strictSame(
    await readJson(issueKey(mobile)),
    { code: newer.code, purposes, sends: [fourth] },
    'for what the former was'
  )
  await redis.del(codeKey(mobile), issueKey(mobile))
  const last = await issue(mobile, 'password')
  t.match(await readJson(issueKey(mobile)), { code: last.code, purposes: { password: true } }, 'not of an expired one')
  t.notMatch((await readJson(issueKey(mobile))).purposes, { sign_up: true })
})

t.test('a code of another service is replaced by a new one, and serves every purpose until then', async (t) => {
  for (const purpose of ['sign_up', 'password'] as const) {
    const mobile = newMobile()
    await issue(mobile, 'sign_up')
    const foreign = await issueCode(mobile)
    t.strictSame(learnt(await hold(mobile, foreign, purpose)), { mayHaveWritten: false, usedBy: undefined })
  }
  const mobile = newMobile()
  const foreign = await issueCode(mobile)
  t.not((await issue(mobile)).code, foreign)
})

t.test('a code serves a purpose that is added, which neither makes a code nor changes its life', async (t) => {
  const mobile = newMobile()
  const [send] = [newSend()]
  const { code } = await issue(mobile, 'password', send)
  for (const key of [codeKey(mobile), issueKey(mobile)]) await redis.pexpire(key, 100_000)
  await codes.addPurpose(mobile, 'sign_up')
  const purposes = { password: true, sign_up: true }
  t.strictSame(await readJson(issueKey(mobile)), { code, purposes, sends: [send] })
  for (const key of [codeKey(mobile), issueKey(mobile)]) await checkTtl(t, key, 100_000)
  await codes.addPurpose(mobile, undefined)
  t.match((await readJson(issueKey(mobile))).purposes, { ...purposes, any: true })
  t.equal(await refusalOf(mobile, code, 'sign_up'), 'held')

  const claimed = await readClaim(mobile)
  await codes.addPurpose(mobile, 'password')
  t.strictSame(await readClaim(mobile), claimed, 'a code that was presented has its purpose')
  const [unknown, foreign, replaced] = [newMobile(), newMobile(), newMobile()]
  await issueCode(foreign)
  await issue(replaced, 'password')
  await issueCode(replaced)
  for (const other of [unknown, foreign, replaced]) {
    const before = await keysOf(other)
    const issued = await readJson(issueKey(other))
    await codes.addPurpose(other, 'sign_up')
    t.strictSame(await keysOf(other), before)
    t.strictSame(await readJson(issueKey(other)), issued)
  }
})

t.test(
  'a code works for the purposes for which it was asked, for no other, and trying another costs nothing',
  async (t) => {
    for (const [asked, presented, isRight] of [
      ['sign_up', 'sign_up', true],
      ['sign_up', 'password', false],
      ['password', 'sign_up', false],
      [undefined, 'password', true]
    ] as const) {
      const mobile = newMobile()
      const { code } = await issue(mobile, asked)
      t.equal(await refusalOf(mobile, code, presented), isRight ? 'held' : 'wrong_code')
      t.equal(await redis.exists(codeKey(mobile)), isRight ? 0 : 1)
      t.equal(await redis.exists(guessesKey(mobile)), 0)
    }
  }
)

t.test(
  'the first hold moves the code into its claim, which lives at least as long as the code would have',
  async (t) => {
    for (const [ttlMs, life] of [
      [100_000, claimTtlMs],
      [1_000_000, 1_000_000],
      [-1, day]
    ] as const) {
      const mobile = newMobile()
      const send = newSend()
      const { code } = await issue(mobile, undefined, send)
      await (ttlMs === -1 ? redis.persist(codeKey(mobile)) : redis.pexpire(codeKey(mobile), ttlMs))
      const [seconds] = await redis.time()
      const { holder, mayHaveWritten, usedBy } = await hold(mobile, code)
      t.strictSame([mayHaveWritten, usedBy], [false, undefined])
      t.strictSame(await keysOf(mobile), [claimKey(mobile)], 'no other key has the code')
      const { until, ...claim } = await readClaim(mobile)
      t.strictSame(claim, { code, purpose: 'sign_up', holder, sends: [send] })
      const leftMs = until - Number(seconds) * 1_000
      t.ok(leftMs >= leaseMs && leftMs < leaseMs + slackMs, 'the lease is the longest time of a request')
      await checkTtl(t, claimKey(mobile), life)
    }
    const slowConfig = config({ HASH_MAX_WAIT_MS: '600000' })
    const slow = await buildCodes(t, slowConfig)
    const mobile = newMobile()
    await hold(mobile, await issueCode(mobile), 'sign_up', address, slow)
    await checkTtl(t, claimKey(mobile), 2 * leaseMsOf(slowConfig))
  }
)

t.test('one request holds a code until its lease expires; then the next one must look for a row', async (t) => {
  const { mobile, code, held: dead } = await holdIssued()
  t.equal(await refusalOf(mobile, code), 'busy')
  await ageClaim(mobile, leaseMs - slackMs)
  t.equal(await refusalOf(mobile, code), 'busy')
  t.equal(await refusalOf(mobile, code, 'password'), 'wrong_code', 'for the other purpose')
  await ageClaim(mobile, slackMs)
  const next = await hold(mobile, code)
  t.strictSame(learnt(next), { mayHaveWritten: true, usedBy: undefined })
  const claim = await readClaim(mobile)
  for (const how of ['unused', 'may_have_written', 'used', 'wrong_password'] as const) {
    t.equal(await codes.release(dead, how, '7'), false, `the first request cannot end the hold of the second: ${how}`)
  }
  t.strictSame(await readClaim(mobile), claim)
  t.equal(await codes.release(next, 'used', '8'), true)
})

t.test('a released code is held again at once, and the claim tells what earlier requests have done', async (t) => {
  const { mobile, code, held } = await holdIssued()
  await redis.pexpire(claimKey(mobile), 1_000)
  t.equal(await codes.release(held, 'unused'), true)
  await checkTtl(t, claimKey(mobile), claimTtlMs)
  t.match(await readClaim(mobile), { holder: undefined, until: 0 })

  const second = await hold(mobile, code)
  t.strictSame(learnt(second), { mayHaveWritten: false, usedBy: undefined })
  await codes.release(second, 'may_have_written')
  const third = await hold(mobile, code)
  t.strictSame(learnt(third), { mayHaveWritten: true, usedBy: undefined })
  await codes.release(third, 'unused')
  const fourth = await hold(mobile, code)
  t.strictSame(learnt(fourth), { mayHaveWritten: true, usedBy: undefined }, 'the doubt stays')
  await codes.release(fourth, 'used', '7')
  const fifth = await hold(mobile, code)
  t.strictSame(learnt(fifth), { mayHaveWritten: false, usedBy: '7' })
  await codes.release(fifth, 'may_have_written')
  t.strictSame(learnt(await hold(mobile, code)), { mayHaveWritten: true, usedBy: '7' })

  const inVain = await holdIssued()
  await codes.release(inVain.held, 'used_in_vain')
  for (let n = 0; n < 2; n++) t.equal(await present(inVain.mobile, inVain.code), 'used_in_vain', 'nobody holds it')
  t.equal((await readClaim(inVain.mobile)).until, 0)
})

t.test('the second wrong password deletes the claim, whatever has happened between', async (t) => {
  const { mobile, code, held } = await holdIssued()
  await codes.release(held, 'used', '7')
  await codes.release(await hold(mobile, code), 'wrong_password')
  await codes.release(await hold(mobile, code), 'used', '7')
  await codes.release(await hold(mobile, code), 'wrong_password')
  t.strictSame(await keysOf(mobile), [])
})

t.test(
  'a claim stays while a newer code is issued or withdrawn, and ends when the newer code is presented',
  async (t) => {
    const { mobile, code, held } = await holdIssued()
    const newer = await issue(mobile)
    await codes.release(held, 'unused')
    const again = await hold(mobile, code)
    t.equal(await redis.get(codeKey(mobile)), newer.code, 'the newer code stays, too')
    await codes.withdraw(mobile, newer.code)
    t.strictSame(await keysOf(mobile), [claimKey(mobile)])
    await codes.release(again, 'unused')

    const newest = await issue(mobile)
    const older = await hold(mobile, code)
    const current = await hold(mobile, newest.code)
    t.strictSame(learnt(current), { mayHaveWritten: false, usedBy: undefined })
    const claim = await readClaim(mobile)
    t.equal(await codes.release(older, 'used', '7'), false)
    t.strictSame(await readClaim(mobile), claim)
    t.equal(await refusalOf(mobile, code), 'wrong_code')
  }
)

t.test(
  'a code that another service sends again does not hide what an earlier request with it may have written',
  async (t) => {
    const ends: [string, (held: Hold) => unknown, boolean][] = [
      ['it has died', () => undefined, true],
      ['it does not know', (held) => codes.release(held, 'may_have_written'), true],
      ['it has used the code', (held) => codes.release(held, 'used', '7'), true],
      ['it has not', (held) => codes.release(held, 'unused'), false]
    ]
    for (const [name, end, mayHaveWritten] of ends) {
      const mobile = newMobile()
      const code = await issueCode(mobile)
      await end(await hold(mobile, code))
      await issueCode(mobile, code)
      t.strictSame(learnt(await hold(mobile, code)), { mayHaveWritten, usedBy: undefined }, name)
      t.equal(await redis.exists(codeKey(mobile)), 0)
    }
  }
)

t.test('a code is used once: it forgets the wrong codes, and refunds each message with it', async (t) => {
  const [first, second, other] = [newSend(), newSend(), newSend()]
  for (const { id } of [first, second, other]) await redis.zadd('sms_codes:all', `${Date.now()}`, id)
  const mobile = newMobile()
  await issue(mobile, undefined, first)
  const { code } = await issue(mobile, undefined, second)
  t.equal(await refusalOf(mobile, wrong), 'wrong_code')
  usedCount = 0
  const held = await hold(mobile, code)
  await codes.release(held, 'used', '7')
  await inFlight.drain()
  t.strictSame(await keysOf(mobile), [claimKey(mobile)])
  t.strictSame(await redis.zrange('sms_codes:all', '0', '-1'), [other.id])
  await codes.release(await hold(mobile, code), 'used', '7')
  t.equal(usedCount, 1)

  const foreign = await issueCode(mobile)
  await codes.release(await hold(mobile, foreign), 'used', '7')
  t.equal(usedCount, 1, 'a code of another service has no messages')

  const inVain = await holdIssued()
  await refusalOf(inVain.mobile, wrong)
  await codes.release(inVain.held, 'used_in_vain')
  t.equal(await redis.exists(guessesKey(inVain.mobile)), 1, 'a code that is used in vain forgets nothing')
})

t.test('a withdrawal deletes a code, unless it was sent again, replaced or presented meanwhile', async (t) => {
  const withdrawn = newMobile()
  await codes.withdraw(withdrawn, (await issue(withdrawn)).code)
  t.strictSame(await keysOf(withdrawn), [])

  const events: Record<string, (mobile: string, code: string) => Promise<unknown>> = {
    'sent again': (mobile) => issue(mobile, 'password'),
    'replaced by another service': (mobile) => issueCode(mobile),
    'also written by another service': (mobile) => redis.del(issueKey(mobile)),
    presented: (mobile, code) => hold(mobile, code),
    expired: (mobile) => redis.del(codeKey(mobile))
  }
  for (const [name, happen] of Object.entries(events)) {
    const mobile = newMobile()
    const { code } = await issue(mobile)
    await happen(mobile, code)
    const state = () => Promise.all([keysOf(mobile), redis.get(codeKey(mobile)), redis.get(issueKey(mobile))])
    const before = await state()
    await codes.withdraw(mobile, code)
    t.strictSame(await state(), before, name)
  }
})

t.test('a wrong code is counted for the guesser and for all, in windows that begin with the first', async (t) => {
  const mobile = newMobile()
  await issueCode(mobile)
  const other = '192.0.2.2'
  await refusalOf(mobile, wrong, 'sign_up', other)
  await refusalOf(mobile, wrong)
  const first = await redis.hgetall(guessesKey(mobile))
  t.strictSame(Object.keys(first).sort(), [address, other, 'all'])
  const [count, end = ''] = `${first[address]}`.split(' ')
  const [seconds] = await redis.time()
  t.equal(count, '1')
  t.ok(Math.abs(Number(end) - Number(seconds) * 1_000 - 60 * minute) < slackMs, 'an hour, by the clock of Redis')
  await checkTtl(t, guessesKey(mobile), day)

  await refusalOf(mobile, wrong)
  t.match(await redis.hgetall(guessesKey(mobile)), { [address]: `2 ${end}`, all: /^3 / }, 'the same window')

  const passed = Number(seconds) * 1_000 - 1
  await redis.hset(guessesKey(mobile), { [address]: `5 ${passed}`, [other]: `5 ${passed}` })
  t.equal(await refusalOf(mobile, wrong), 'wrong_code', 'the window of the guesser has ended')
  const next = await redis.hgetall(guessesKey(mobile))
  t.match(next, { [address]: /^1 \d{13}$/, all: /^4 / })
  t.ok(Number(next[address]?.split(' ')[1]) >= Number(end), 'a new window has begun')
  t.strictSame(Object.keys(next).sort(), [address, 'all'], 'a past window leaves nothing')
})

t.test('the counts of a mobile live as long as their longest window, which for a ticket has two hours', async (t) => {
  const mobile = newMobile()
  await issueCode(mobile)
  const ticket = codes.createTicket(mobile)
  const guess = () => t.rejects(codes.hold({ body: { mobile, sms_code: wrong, ticket }, ip: address, log }, 'sign_up'))
  await guess()
  await checkTtl(t, guessesKey(mobile), 120 * minute)
  await redis.pexpire(guessesKey(mobile), 180 * minute)
  await guess()
  t.equal(await redis.hlen(guessesKey(mobile)), 1)
  await checkTtl(t, guessesKey(mobile), 180 * minute)
})

t.test('a wrong code counts for ten minutes where there is nothing to guess: no code, or a used one', async (t) => {
  const states: [string, (mobile: string) => Promise<unknown>, boolean][] = [
    ['nothing', async () => undefined, false],
    ['a code', (mobile) => issueCode(mobile), true],
    ['a code that a request holds', (mobile) => holdIssued(mobile), true],
    [
      'a code that a request has released',
      async (mobile) => codes.release((await holdIssued(mobile)).held, 'unused'),
      true
    ],
    ['a used code', async (mobile) => codes.release((await holdIssued(mobile)).held, 'used', '7'), false],
    ['a code used in vain', async (mobile) => codes.release((await holdIssued(mobile)).held, 'used_in_vain'), false],
    [
      'a used code that a repeat holds',
      async (mobile) => {
        const { code, held } = await holdIssued(mobile)
        await codes.release(held, 'used', '7')
        await hold(mobile, code)
      },
      false
    ]
  ]
  for (const [name, prepare, isGuessable] of states) {
    const mobile = newMobile()
    await prepare(mobile)
    for (let n = 0; n < 5; n++) t.equal(await refusalOf(mobile, wrong), 'wrong_code', name)
    const ms = isGuessable ? day : 10 * minute
    await checkTtl(t, guessesKey(mobile), ms)
    const refusal: unknown = await hold(mobile, wrong).catch((error: unknown) => error)
    if (!(refusal instanceof Refusal)) throw new Error('the sixth try is not refused')
    const { retryAfterSeconds = 0 } = refusal.details
    const longest = Math.min(ms, 60 * minute) / 1_000
    t.ok(
      retryAfterSeconds > longest - slackMs / 1_000 && retryAfterSeconds <= longest,
      `${name}: ${retryAfterSeconds} s`
    )
  }
  // What was counted before there was a code counts for the whole window, as soon as there is one.
  const mobile = newMobile()
  for (let n = 0; n < 2; n++) await refusalOf(mobile, wrong)
  await issueCode(mobile)
  for (let n = 0; n < 3; n++) await refusalOf(mobile, wrong)
  await checkTtl(t, guessesKey(mobile), day)
  t.equal(await refusalOf(mobile, wrong), 'too_many_requests')
})

t.test('the right code in another dress is the code, and what cannot be a code costs nothing', async (t) => {
  const dress = (code: string) => [...code].map((digit) => String.fromCodePoint(0xff10 + Number(digit))).join('')
  for (const put of [
    (mobile: string) => issue(mobile).then(({ code }) => code),
    (mobile: string) => issueCode(mobile, '246813')
  ]) {
    const mobile = newMobile()
    const code = await put(mobile)
    const held = await hold(mobile, `${code.slice(0, 3)} ${code.slice(3)}`)
    t.equal((await readClaim(mobile)).code, code, 'the claim has the code itself')
    t.equal(await refusalOf(mobile, dress(code)), 'busy')
    await codes.release(held, 'used', '7')
    for (const again of [code, dress(code), `${code}${code}`]) {
      const repeat = await hold(mobile, again)
      t.equal(repeat.usedBy, '7', 'G5: the same request in another dress is a repeat')
      await codes.release(repeat, 'used', '7')
    }
    t.equal(await redis.exists(guessesKey(mobile)), 0)
  }

  const issued = newMobile()
  await issue(issued)
  const claimed = await holdIssued()
  await codes.release(claimed.held, 'unused')
  for (const mobile of [issued, claimed.mobile, newMobile()]) {
    for (const text of ['12345', '1234567', 'abcdef', '１２３', '123456123457', ' ']) {
      t.equal(await refusalOf(mobile, text), 'wrong_code', text)
    }
    t.equal(await redis.exists(guessesKey(mobile)), 0)
  }
})

t.test(
  'a code of another service may be any text: it is compared as it stands, and everything wrong counts',
  async (t) => {
    for (const code of ['Ab-12', '12345', '１２３４５６', ' 7 ', '123456123456']) {
      const mobile = newMobile()
      await issueCode(mobile, code)
      t.equal(await refusalOf(mobile, 'ab-12'), 'wrong_code')
      t.match(await redis.hget(guessesKey(mobile), address), /^1 /)
      const held = await hold(mobile, code)
      t.equal((await readClaim(mobile)).code, code)
      await codes.release(held, 'unused')
      t.equal(await refusalOf(mobile, '1234'), 'wrong_code')
      t.match(await redis.hget(guessesKey(mobile), address), /^2 /, 'also while a claim has it')
      await codes.release(await hold(mobile, code), 'used', '7')
    }
  }
)

t.test('spent guesses are refused until the end of the longest window, which is reported', async (t) => {
  const mobile = newMobile()
  const code = await issueCode(mobile)
  const [hour, aDay] = [3_600, 86_400]
  await refusalOf(mobile, wrong)

  /** Stores windows that end in so many seconds. Checks how long the right code is refused, and by which budget. */
  async function checkSpent(guesserEnd: number, allEnd: number, windowEnd: number, budget: LimitName) {
    const [seconds] = await redis.time()
    const now = Number(seconds) * 1_000
    await redis.hset(guessesKey(mobile), {
      [address]: `5 ${now + guesserEnd * 1_000}`,
      all: `50 ${now + allEnd * 1_000}`
    })
    refusals.length = 0
    const refusal = await hold(mobile, code).catch((error: unknown) => error)
    if (!(refusal instanceof Refusal)) throw new Error('the right code is not refused')
    t.equal(refusal.outcome, 'too_many_requests')
    const { retryAfterSeconds = 0 } = refusal.details
    t.ok(retryAfterSeconds > windowEnd - slackMs / 1_000 && retryAfterSeconds <= windowEnd, `${retryAfterSeconds} s`)
    t.strictSame(refusals, [budget])
  }

  await checkSpent(hour / 2, -1, hour / 2, 'guesses_guesser')
  await checkSpent(hour / 2, 100, hour / 2, 'guesses_guesser')
  await checkSpent(hour / 2, aDay / 2, aDay / 2, 'guesses_mobile')
  await checkSpent(-1, aDay / 2, aDay / 2, 'guesses_mobile')
  t.equal(await redis.get(codeKey(mobile)), code)
})
