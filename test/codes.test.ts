import { randomUUID } from 'node:crypto'
import Fastify from 'fastify'
import t, { type Test } from 'tap'
import { digitsOf, randomCode } from '#src/codes/code-format.js'
import { type CodePurpose, createCodes, type Hold } from '#src/codes/codes.js'
import type { Config } from '#src/config/config.js'
import { InFlight } from '#src/http/in-flight.js'
import { Refusal } from '#src/outcomes.js'
import { createRateLimits } from '#src/stores/rate-limits.js'
import { openRedis } from '#src/stores/redis.js'
import { claimKey, leaseMsOf, startTestbed } from '../testkit/testbed.js'

/*
 * The life of a code: what each script leaves in Redis, and what the next one finds, without a server. test/races.test.ts,
 * test/sms-codes.test.ts and test/strangers.test.ts send requests.
 */

const { ageClaim, config, issueCode, newMobile, readClaim, redis } = await startTestbed(t)

const log = Fastify().log

async function buildCodes(t: Test, config: Config) {
  const app = Fastify()
  t.teardown(() => app.close())
  const redis = await openRedis(app, config, undefined)
  return createCodes(config, redis, createRateLimits(redis, undefined), new InFlight(), undefined)
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
const readIssue = async (mobile: string) => JSON.parse((await redis.get(issueKey(mobile))) ?? 'null')
const redisNow = async () => Number((await redis.time())[0]) * 1_000

const address = '192.0.2.1'
/** Six digits, because what cannot be a code costs nothing. The codes of `issueCode` have letters. */
const wrong = '000000'
const newSend = () => ({ id: randomUUID(), network: address })
const issue = (mobile: string, purpose?: CodePurpose, send = newSend()) => codes.issue(mobile, purpose, send)

/** Presents a code. Returns the hold, or `used_in_vain`, or the outcome of the refusal. */
const present = (mobile: string, sms_code: string, purpose: CodePurpose = 'sign_up', ip = address, ticket?: string) =>
  codes
    .hold({ body: { mobile, sms_code, ...(ticket !== undefined && { ticket }) }, ip, log }, purpose)
    .catch((error: unknown) => (error instanceof Refusal ? error.outcome : Promise.reject(error)))

/** Presents a code that must be right. */
async function hold(...args: Parameters<typeof present>): Promise<Hold> {
  const result = await present(...args)
  if (typeof result === 'string') throw new Error(`the code is not held: ${result}`)
  return result
}

async function holdIssued(mobile = newMobile()) {
  const { code } = await issue(mobile)
  return { mobile, code, held: await hold(mobile, code) }
}

async function checkTtl(t: Test, key: string, ms: number): Promise<void> {
  const ttlMs = await redis.pttl(key)
  t.ok(ttlMs > ms - slackMs && ttlMs <= ms, `${key}: ${ttlMs} ms of ${ms} ms`)
}

t.test('a code is sent again while at least half of its life is left, and then serves every purpose', async (t) => {
  const mobile = newMobile()
  const sends = [newSend(), newSend(), newSend()]
  const { code, ttlSeconds } = await issue(mobile, 'sign_up', sends[0])
  t.match(code, /^\d{6}$/)
  t.equal(ttlSeconds, 300)
  t.equal(await redis.get(codeKey(mobile)), code)
  t.strictSame(await readIssue(mobile), { code, purposes: { sign_up: true }, sends: sends.slice(0, 1) })
  for (const key of [codeKey(mobile), issueKey(mobile)]) {
    await checkTtl(t, key, lifeMs)
    await redis.pexpire(key, 200_000)
  }
  const again = await issue(mobile, 'password', sends[1])
  t.equal(again.code, code)
  t.ok(again.ttlSeconds > 170 && again.ttlSeconds <= 200)
  for (const key of [codeKey(mobile), issueKey(mobile)]) await checkTtl(t, key, 200_000)
  await issue(mobile, undefined, sends[2])
  const purposes = { sign_up: true, password: true, any: true }
  t.strictSame(await readIssue(mobile), { code, purposes, sends })

  await redis.pexpire(codeKey(mobile), lifeMs / 2 - 1)
  const send = newSend()
  const newer = await issue(mobile, 'password', send)
  t.equal(newer.ttlSeconds, 300, 'a code in the second half of its life is replaced')
  t.strictSame(await readIssue(mobile), { code: newer.code, purposes, sends: [send] }, 'for what the former was')
  await redis.del(codeKey(mobile))
  await issue(mobile, 'password')
  t.strictSame((await readIssue(mobile)).purposes, { password: true }, 'not for what an expired one was')
  const foreign = await issueCode(mobile)
  const own = await issue(mobile, 'password')
  t.not(own.code, foreign, 'a code of another service is replaced')
  // G8: it serves everything, as that one did.
  await hold(mobile, own.code, 'sign_up')
})

t.test('G8: a purpose that is added neither makes a code nor changes its life', async (t) => {
  const mobile = newMobile()
  const send = newSend()
  const { code } = await issue(mobile, 'password', send)
  for (const key of [codeKey(mobile), issueKey(mobile)]) await redis.pexpire(key, 100_000)
  for (const purpose of ['sign_up', undefined] as const) await codes.addPurpose(mobile, purpose)
  const purposes = { password: true, sign_up: true, any: true }
  t.strictSame(await readIssue(mobile), { code, purposes, sends: [send] })
  for (const key of [codeKey(mobile), issueKey(mobile)]) await checkTtl(t, key, 100_000)
  await hold(mobile, code)
  const [unknown, foreign, replaced] = [newMobile(), newMobile(), newMobile()]
  await issueCode(foreign)
  await issue(replaced, 'password')
  await issueCode(replaced)
  for (const other of [mobile, unknown, foreign, replaced]) {
    const state = async () => [await keysOf(other), await readIssue(other), await redis.get(claimKey(other))]
    const before = await state()
    await codes.addPurpose(other, 'password')
    t.strictSame(await state(), before)
  }
})

t.test('G4, G5: the first hold moves the code into its claim, which outlives the code and two leases', async (t) => {
  for (const [ttlMs, life] of [
    [100_000, claimTtlMs],
    [1_000_000, 1_000_000],
    [-1, day]
  ] as const) {
    const mobile = newMobile()
    const send = newSend()
    const { code } = await issue(mobile, undefined, send)
    await (ttlMs === -1 ? redis.persist(codeKey(mobile)) : redis.pexpire(codeKey(mobile), ttlMs))
    const now = await redisNow()
    const { holder, mayHaveWritten, usedBy } = await hold(mobile, code)
    t.strictSame([mayHaveWritten, usedBy], [false, undefined])
    t.strictSame(await keysOf(mobile), [claimKey(mobile)], 'no other key has the code')
    const { until, ...claim } = await readClaim(mobile)
    t.strictSame(claim, { code, purpose: 'sign_up', holder, sends: [send] })
    t.ok(until - now >= leaseMs && until - now < leaseMs + slackMs, 'the lease is the longest time of a request')
    await checkTtl(t, claimKey(mobile), life)
  }
  const slowConfig = config({ HASH_MAX_WAIT_MS: '600000' })
  const slow = await buildCodes(t, slowConfig)
  const mobile = newMobile()
  await slow.hold({ body: { mobile, sms_code: await issueCode(mobile) }, ip: address, log }, 'sign_up')
  await checkTtl(t, claimKey(mobile), 2 * leaseMsOf(slowConfig))
})

t.test('G4, G5: a repeat learns what the earlier requests with its code may have done', async (t) => {
  type End = Parameters<typeof codes.release>[1] | 'dies'
  for (const [ends, learns, learnsIfSentAgain] of [
    // What the next request learns: whether a row may have been written, and for whom the code was used. Then: what it learns
    // if another service has sent the same code again meanwhile.
    [['unused'], [false], [false]],
    [['dies'], [true], [true]],
    [['may_have_written'], [true], [true]],
    [['may_have_written', 'unused'], [true], [true]],
    [['dies', 'unused'], [true], [true]],
    [['used'], [false, '7'], [true]],
    [['may_have_written', 'used'], [false, '7'], [true]],
    [['used', 'dies'], [true, '7'], [true]],
    [['used', 'may_have_written'], [true, '7'], [true]],
    [['used', 'wrong_password'], [false, '7'], [true]],
    [['used_in_vain'], 'used_in_vain', [true]],
    [['used', 'unused'], [false, '7'], [true]],
    [['used', 'wrong_password', 'used', 'wrong_password'], 'wrong_code', [false]],
    // Nobody has used the code, and the row has another password: the 409 stays one (G5).
    [['wrong_password', 'wrong_password'], 'used_in_vain', [true]]
  ] as [End[], [boolean, string?] | string, [boolean]][]) {
    for (const isSentAgain of [false, true]) {
      const mobile = newMobile()
      const code = await issueCode(mobile)
      await present(mobile, wrong)
      for (const end of ends) {
        const held = await hold(mobile, code)
        t.ok((await readClaim(mobile)).until > 0, 'every repeat holds the code')
        await redis.pexpire(claimKey(mobile), 1_000)
        if (end === 'dies') await ageClaim(mobile, leaseMs)
        else t.equal(await codes.release(held, end, '7'), true)
        if (end !== 'dies' && (await redis.exists(claimKey(mobile)))) await checkTtl(t, claimKey(mobile), claimTtlMs)
      }
      if (isSentAgain) await issueCode(mobile, code)
      const name = `${ends}${isSentAgain ? ', sent again' : ''}`
      const result = await present(mobile, code)
      if (typeof result === 'string') t.equal(result, learns, name)
      else {
        const { mayHaveWritten, usedBy } = result
        const [wasWritten, user] = isSentAgain ? learnsIfSentAgain : learns
        t.strictSame([mayHaveWritten, usedBy], [wasWritten, user], name)
      }
      t.equal(await redis.exists(codeKey(mobile)), 0)
      const isForgotten = (await redis.exists(guessesKey(mobile))) === 0
      t.equal(isForgotten, ends.includes('used'), 'only a success forgets wrong codes')
    }
  }
})

t.test('G1: one request holds a code until its lease expires, and only the holder can release it', async (t) => {
  const { mobile, code, held: dead } = await holdIssued()
  await ageClaim(mobile, leaseMs - slackMs)
  t.equal(await present(mobile, code), 'busy')
  t.equal(await present(mobile, code, 'password'), 'wrong_code', 'for another purpose')
  t.equal(await redis.exists(guessesKey(mobile)), 0, 'which costs nothing')
  await ageClaim(mobile, slackMs)
  const next = await hold(mobile, code)
  const newer = await issue(mobile)
  const current = await hold(mobile, newer.code)
  t.strictSame([current.mayHaveWritten, current.usedBy], [false, undefined])
  t.equal(await present(mobile, code), 'wrong_code', 'the newer code has replaced the claim')
  const claim = await readClaim(mobile)
  for (const how of ['unused', 'may_have_written', 'used', 'used_in_vain', 'wrong_password'] as const) {
    for (const former of [dead, next]) t.equal(await codes.release(former, how, '7'), false, how)
  }
  t.strictSame(await readClaim(mobile), claim)
  t.equal(await codes.release(current, 'used', '8'), true)
  t.equal(await codes.release(current, 'unused'), false, 'once')
})

t.test('G4: a withdrawal deletes a code, unless it was sent again, replaced or presented meanwhile', async (t) => {
  const { mobile: claimed, code: claimedCode, held } = await holdIssued()
  await codes.withdraw(claimed, (await issue(claimed)).code)
  t.strictSame(await keysOf(claimed), [claimKey(claimed)], 'the claim of an older code stays')
  await codes.release(held, 'unused')
  await hold(claimed, claimedCode)

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
    const state = async () => [await keysOf(mobile), await redis.get(codeKey(mobile)), await readIssue(mobile)]
    const before = await state()
    await codes.withdraw(mobile, code)
    t.strictSame(await state(), before, name)
  }
})

t.test('G8: a wrong code counts for its guesser and for all, and a past window leaves nothing', async (t) => {
  const mobile = newMobile()
  await issueCode(mobile)
  const other = '192.0.2.2'
  for (const from of [other, address]) await present(mobile, wrong, 'sign_up', from)
  const window = /^1 \d{13}$/
  t.match(await redis.hgetall(guessesKey(mobile)), { [address]: window, [other]: window, all: /^2 / })
  await checkTtl(t, guessesKey(mobile), day)

  const now = await redisNow()
  await redis.hset(guessesKey(mobile), { [address]: `5 ${now - 1}`, [other]: `5 ${now - 1}` })
  t.equal(await present(mobile, wrong), 'wrong_code')
  const { [address]: next, all, ...past } = await redis.hgetall(guessesKey(mobile))
  t.match([next, all], [window, /^3 /])
  t.strictSame(past, {})

  await present(mobile, wrong, 'sign_up', address, codes.createTicket(mobile))
  t.equal(await redis.hlen(guessesKey(mobile)), 3)
  await checkTtl(t, guessesKey(mobile), day)
})

t.test('a code of another service is any text, compared as it stands; everything wrong counts', async (t) => {
  for (const code of ['Ab-12', '12345', '１２３４５６', ' 7 ', '123456123456']) {
    const mobile = newMobile()
    // It serves everything, whatever the code was asked for that it replaces.
    await issue(mobile, 'password')
    await issueCode(mobile, code)
    t.equal(await present(mobile, 'ab-12'), 'wrong_code')
    t.match(await redis.hget(guessesKey(mobile), address), /^1 /)
    const held = await hold(mobile, code)
    t.equal((await readClaim(mobile)).code, code)
    await codes.release(held, 'unused')
    t.equal(await present(mobile, '1234'), 'wrong_code')
    t.match(await redis.hget(guessesKey(mobile), address), /^2 /, 'also while a claim has it')
    await hold(mobile, code)
  }
})

t.test('a new code is six digits, each of them uniformly distributed', async (t) => {
  const codes = Array.from({ length: 20_000 }, randomCode)
  t.ok(codes.every((code) => /^\d{6}$/.test(code)))
  // Six standard deviations: one run in eight million fails by chance.
  const tolerance = 6 * Math.sqrt(codes.length * 0.1 * 0.9)
  for (let n = 0; n < 60; n++) {
    const count = codes.filter((code) => code[n % 6] === `${Math.floor(n / 6)}`).length
    t.ok(Math.abs(count - codes.length / 10) < tolerance, `digit ${Math.floor(n / 6)} at position ${n % 6}: ${count}`)
  }
})

t.test('the six digits are the same as people type and paste them, and nothing else can be a code', async (t) => {
  for (const text of [
    ...['012345', '０１２３４５', '𝟎𝟏𝟐𝟑𝟒𝟓', '⓪①②③④⑤', '⁰¹²³⁴⁵', '０１２345'],
    ...['012 345', '0 1 2 3 4 5 ', '012\u3000345', '012\u00a0345', '012\u202f345', '\t012345\r\n'],
    ...['012-345', '012－345', '012‑345', '012–345', '012−345', '012\u00ad345'],
    ...['012\u200b345', '0\u200d12345', '\ufeff012345', '\u202a012345\u202c\u200e', '\u2068012345\u2069'],
    ...['0\ufe0f12345', '012345\u3164', '012345\u0000', '012\u2800345'],
    ...['012345012345', '012345 012345', '012-345\n０１２ ３４５', '0 1 2 3 4 5 0 1 2 3 4 5']
  ]) {
    t.equal(digitsOf(text), '012345', JSON.stringify(text))
  }
  for (const text of [
    ...['01234', '0123456', '012345012346', '012345012345012345', ' - ', 'abcdef', 'O12345'],
    ...['012.345', '+012345', '٠١٢٣٤٥', '1e5000', 'Your code is 012345']
  ]) {
    t.equal(digitsOf(text), '', JSON.stringify(text))
  }
})
