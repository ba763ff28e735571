import { createHmac, hkdfSync } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import Fastify from 'fastify'
import t, { type Test } from 'tap'
import { type Claim, type ClaimResult, type CodePurpose, codes as codesPlugin } from '../dist/codes/codes.js'
import type { Config } from '../dist/config/config.js'
import type { LimitName } from '../dist/stores/rate-limits.js'
import { rateLimits } from '../dist/stores/rate-limits.js'
import { redis as redisPlugin } from '../dist/stores/redis.js'
import { leaseMsOf, recordKey, startTestbed } from '../testkit/testbed.js'

/*
 * What each step in the life of a code leaves in Redis: which keys, fields and TTLs. Other test files send requests and see
 * only the answers. These tests call the plugin without a server.
 */

const { ageClaim, config, issueCode, newMobile, redis, stores } = await startTestbed(t)

const refusals: string[] = []
let usedCount = 0
const observer = {
  onRoundTrip: () => undefined,
  onHash: () => undefined,
  onCodeSent: () => undefined,
  onCodeUsed: () => usedCount++,
  onLimitReached: (limit: string) => refusals.push(limit)
}

async function buildCodes(t: Test, config: Config) {
  const app = Fastify()
  t.teardown(() => app.close())
  await app.register(redisPlugin, { config })
  await app.register(rateLimits, { observer })
  await app.register(codesPlugin, { config, observer })
  return app.codes
}

const codes = await buildCodes(t, config())

const leaseMs = leaseMsOf(config())
const lifeMs = 300_000

/** How long a record lives at least. Longer than twice the lease of this test. */
const recordTtlMs = 300_000

/** How much of a TTL may have passed until a test reads it, on a busy machine. */
const slackMs = 30_000

const codeKey = (mobile: string) => `sms_code_${mobile}`
const issueKey = (mobile: string) => `{sms_code_${mobile}}:issue`
const guessesKey = (mobile: string) => `{sms_code_${mobile}}:guesses`
const keysOf = async (mobile: string) => (await redis.keys(`*${mobile}*`)).sort()

const address = '192.0.2.1'

const readJson = async (key: string) => JSON.parse((await redis.get(key)) ?? 'null')

/** Returns the time of Redis in µs. */
async function redisNow(): Promise<number> {
  const [seconds, microseconds] = await redis.time()
  return Number(seconds) * 1_000_000 + Number(microseconds)
}

async function checkTtl(t: Test, key: string, ms: number): Promise<void> {
  const ttlMs = await redis.pttl(key)
  t.ok(ttlMs > ms - slackMs && ttlMs <= ms, `${key}: ${ttlMs} ms of ${ms} ms`)
}

const presentCode = (
  mobile: string,
  code: string,
  purpose: CodePurpose = 'sign_up',
  from = address,
  instance = codes
) => instance.claim(mobile, code, purpose, { ticket: undefined, address: from })

/** Presents a code, and returns the claim. */
async function claim(...args: Parameters<typeof presentCode>): Promise<Claim> {
  const result = await presentCode(...args)
  if (result.state !== 'claimed') throw new Error(`the code is not claimed, but ${result.state}`)
  return result
}

/** Presents a code that has been completed, and returns the replay. */
async function replay(mobile: string, code: string) {
  const result = await presentCode(mobile, code)
  if (result.state !== 'done') throw new Error(`it is no replay, but ${result.state}`)
  return result
}

/** Issues a code for a sign-up. */
const issue = (mobile: string, purpose: CodePurpose = 'sign_up') => codes.issue(mobile, purpose, address)

/** Issues a code, and claims it with a TTL. */
async function claimIssued(mobile = newMobile(), ttlMs = lifeMs) {
  const { code } = await issue(mobile)
  const issued = await readJson(issueKey(mobile))
  for (const key of [codeKey(mobile), issueKey(mobile)]) await redis.pexpire(key, ttlMs)
  return { mobile, code, issued, claim: await claim(mobile, code) }
}

/** Issues, claims and completes a code. */
async function completeIssued() {
  const claimed = await claimIssued()
  await codes.complete(claimed.claim, '7')
  return claimed
}

/** What the claim record keeps of an issue. */
function withoutCode({ code: _, ...issued }: { code: string }) {
  return issued
}

t.test('a new code and its issue have the same TTL; a resend keeps it, and notes its time and network', async (t) => {
  const mobile = newMobile()
  const before = await redisNow()
  const first = await codes.issue(mobile, 'sign_up', address)
  const after = await redisNow()
  t.match(first, { code: /^\d{6}$/, ttlSeconds: 300 })
  t.equal(await redis.get(codeKey(mobile)), first.code)
  const [firstSend] = (await readJson(issueKey(mobile))).sends
  t.ok(before <= Number(firstSend.at) && Number(firstSend.at) <= after, 'the time is that of Redis')
  t.equal(firstSend.network, address)
  t.strictSame(await readJson(issueKey(mobile)), { code: first.code, purpose: 'sign_up', sends: [firstSend] })
  for (const key of [codeKey(mobile), issueKey(mobile)]) {
    await checkTtl(t, key, lifeMs)
    await redis.pexpire(key, 200_000)
  }

  const second = await codes.issue(mobile, 'sign_up', '2001:db8::1')
  t.equal(second.code, first.code)
  t.ok(second.ttlSeconds > 170 && second.ttlSeconds <= 200)
  const { sends } = await readJson(issueKey(mobile))
  t.match(sends, [firstSend, { at: /^\d{16}$/, network: '2001:db8:0:0::/64' }])
  for (const key of [codeKey(mobile), issueKey(mobile)]) await checkTtl(t, key, 200_000)
})

t.test('a new code is for one purpose or for both, and replaces a code of another purpose or service', async (t) => {
  const mobile = newMobile()
  const forBoth = await codes.issue(mobile, undefined, address)
  t.strictSame(Object.keys(await readJson(issueKey(mobile))).sort(), ['code', 'sends'])
  t.equal((await codes.issue(mobile, undefined, address)).code, forBoth.code)

  const issueForBoth = await readJson(issueKey(mobile))
  const forReset = await issue(mobile, 'password')
  const { purpose, sends, replaced } = await readJson(issueKey(mobile))
  t.equal(purpose, 'password')
  t.strictSame(replaced, { code: forBoth.code, expires: replaced.expires, issue: issueForBoth })
  const restMs = replaced.expires - sends[0].at / 1_000
  t.ok(restMs > lifeMs - slackMs && restMs <= lifeMs, `${restMs} ms`)

  await issue(mobile)
  const second = (await readJson(issueKey(mobile))).replaced
  t.equal(second.code, forReset.code)
  t.equal(second.issue.replaced, undefined, 'only one replaced code is kept')

  const foreign = await issueCode(mobile)
  await issue(mobile, 'password')
  const third = (await readJson(issueKey(mobile))).replaced
  t.strictSame(third, { code: foreign, expires: third.expires }, 'a code of another service has no issue')
  await redis.persist(codeKey(mobile))
  await issue(mobile, 'password')
  const fourth = (await readJson(issueKey(mobile))).replaced
  t.equal(fourth.expires, undefined, 'a code without a TTL is not sent again')
})

t.test('a claim moves a code into its record, which lives for 300 s or as long as the code', async (t) => {
  for (const ttlMs of [100_000, 1_000_000]) {
    const mobile = newMobile()
    const { code } = await issue(mobile)
    const issued = await readJson(issueKey(mobile))
    await redis.pexpire(codeKey(mobile), ttlMs)
    t.equal((await presentCode(mobile, 'wrong')).state, 'wrong')
    const claimed = await claim(mobile, code)
    t.match(claimed, { mobile, code, isReclaim: false, claimId: /^\d{16}$/ })
    t.ok(claimed.ttlMs > ttlMs - slackMs && claimed.ttlMs <= ttlMs)
    t.strictSame(JSON.parse(claimed.issue), withoutCode(issued))
    const { claimId: at, mac, ttlMs: ttl } = claimed
    t.strictSame(await readJson(recordKey(mobile)), { state: 'pending', mac, at, ttl, issue: withoutCode(issued) })
    await checkTtl(t, recordKey(mobile), Math.max(recordTtlMs, ttlMs))
    t.strictSame(await keysOf(mobile), [recordKey(mobile), guessesKey(mobile)].sort(), 'no key has the code')
  }
})

t.test('a record lives for two leases, so that a retry after the lease finds it', async (t) => {
  const slowConfig = config({ HASH_MAX_WAIT_MS: '600000' })
  const slow = await buildCodes(t, slowConfig)
  const mobile = newMobile()
  const claimed = await slow.claim(mobile, await issueCode(mobile), 'sign_up', { ticket: undefined, address })
  t.equal(claimed.state, 'claimed')
  await checkTtl(t, recordKey(mobile), 2 * leaseMsOf(slowConfig))
})

t.test(
  'the MAC of a code does not change between versions, so that requests can be retried during an upgrade',
  async (t) => {
    const secret = `${stores.environment.SESSION_SECRET}`
    const key = Buffer.from(hkdfSync('sha256', secret, '', 'mobile-signup: code of an attempt', 32))
    for (const [purpose, text] of [
      ['sign_up', 'sign-up'],
      ['password', 'password']
    ] as const) {
      const mobile = newMobile()
      const code = await issueCode(mobile)
      const { mac } = await claim(mobile, code, purpose)
      t.equal(mac, createHmac('sha256', key).update(`${text}:${mobile}:${code}`).digest('base64url'))
    }
  }
)

t.test('a first claim is no reclaim, also from an IPv6 address, which has three budgets', async (t) => {
  const mobile = newMobile()
  t.equal((await presentCode(mobile, 'wrong', 'sign_up', '2001:db8::1')).state, 'wrong')
  const code = await issueCode(mobile)
  t.equal((await claim(mobile, code, 'sign_up', '2001:db8::1')).isReclaim, false)
})

t.test('a code that was restored is claimed again as a reclaim only if its row may be committed', async (t) => {
  for (const mayBeCommitted of [true, false]) {
    const { mobile, code, claim: first } = await claimIssued()
    await codes.restore(first, mayBeCommitted)
    t.equal((await claim(mobile, code)).isReclaim, mayBeCommitted)
  }
})

t.test('a code in a claim is in progress until the lease expires; a reclaim has its issue and its TTL', async (t) => {
  const { mobile, code, issued, claim: first } = await claimIssued(newMobile(), 200_000)
  t.strictSame(await presentCode(mobile, code), { state: 'in_progress' })
  await ageClaim(mobile, leaseMs - slackMs)
  t.strictSame(await presentCode(mobile, code), { state: 'in_progress' })
  t.equal((await presentCode(mobile, code, 'password')).state, 'wrong', 'for the other purpose')
  t.equal(await redis.exists(guessesKey(mobile)), 1, 'which is counted, because the claim can be taken over')
  await ageClaim(mobile, slackMs)
  const second = await claim(mobile, code)
  t.strictSame(await keysOf(mobile), [recordKey(mobile), guessesKey(mobile)].sort())
  t.equal(second.isReclaim, true)
  t.equal(second.ttlMs, first.ttlMs)
  t.strictSame(JSON.parse(second.issue), withoutCode(issued))
  t.not(second.claimId, first.claimId)

  const record = await readJson(recordKey(mobile))
  await codes.restore(first, true)
  t.strictSame(await codes.discard(first), { wasTakenOver: true })
  await codes.concede(first, '7')
  t.strictSame(await readJson(recordKey(mobile)), record, 'the first request cannot end the second claim')
  t.equal(await redis.exists(codeKey(mobile)), 0)

  await codes.restore(second, false)
  t.strictSame(await readJson(issueKey(mobile)), issued, 'the purpose is back, too')
  t.equal((await presentCode(mobile, code, 'password')).state, 'wrong')
})

t.test('a restore puts the code and its issue back with the TTL that they had', async (t) => {
  for (const mayBeCommitted of [true, false]) {
    for (const ttlMs of [200_000, 1_000_000]) {
      const { mobile, code, issued, claim: restored } = await claimIssued(newMobile(), ttlMs)
      await codes.restore(restored, mayBeCommitted)
      t.equal(await redis.get(codeKey(mobile)), code)
      t.strictSame(await readJson(issueKey(mobile)), issued)
      for (const key of [codeKey(mobile), issueKey(mobile)]) await checkTtl(t, key, restored.ttlMs)
      if (!mayBeCommitted) {
        t.equal(await redis.exists(recordKey(mobile)), 0)
        continue
      }
      const { claimId: at, mac, ttlMs: ttl } = restored
      const record = { state: 'unknown', mac, at, ttl, issue: withoutCode(issued) }
      t.strictSame(await readJson(recordKey(mobile)), record, 'without the code')
      await checkTtl(t, recordKey(mobile), Math.max(recordTtlMs, ttlMs))
    }
  }
})

t.test('a restored code of another service has no issue, and no TTL if it had none', async (t) => {
  const mobile = newMobile()
  const code = await issueCode(mobile)
  await redis.persist(codeKey(mobile))
  await codes.restore(await claim(mobile, code), true)
  t.equal(await redis.get(codeKey(mobile)), code)
  t.equal(await redis.pttl(codeKey(mobile)), -1)
  t.strictSame(await keysOf(mobile), [codeKey(mobile), recordKey(mobile)].sort())
  await checkTtl(t, recordKey(mobile), recordTtlMs)
})

t.test('a code that was claimed in its last millisecond is not restored for ever', async (t) => {
  const { mobile, claim: claimed } = await claimIssued()
  await codes.restore({ ...claimed, ttlMs: 0 }, false)
  await sleep(50)
  t.strictSame(await keysOf(mobile), [])
})

t.test('a restore leaves a newer code and its issue, and the claim of a newer code', async (t) => {
  const { mobile, claim: older } = await claimIssued()
  const newer = await issue(mobile)
  const issued = await readJson(issueKey(mobile))
  await codes.restore(older, false)
  t.equal(await redis.get(codeKey(mobile)), newer.code)
  const { replaced: _, ...unchanged } = await readJson(issueKey(mobile))
  t.strictSame(unchanged, issued)

  for (const isIssued of [true, false]) {
    const { mobile, claim: older } = await claimIssued()
    if (isIssued) await issue(mobile)
    const foreign = await issueCode(mobile)
    const issued = await redis.get(issueKey(mobile))
    await codes.restore(older, false)
    t.equal(await redis.get(codeKey(mobile)), foreign)
    t.equal(await redis.get(issueKey(mobile)), issued, 'the issue of another code is left alone')
  }

  const { claim: late } = await claimIssued()
  const newerClaim = await claim(late.mobile, (await issue(late.mobile)).code)
  const record = await readJson(recordKey(late.mobile))
  await codes.restore(late, true)
  t.strictSame(await codes.discard(late), { wasTakenOver: false }, 'the older code was not claimed by another request')
  t.strictSame(await keysOf(late.mobile), [recordKey(late.mobile)])
  t.strictSame(await readJson(recordKey(late.mobile)), record)

  await codes.complete(newerClaim, '7')
  const done = await readJson(recordKey(late.mobile))
  await codes.restore(late, true)
  t.equal(await redis.exists(codeKey(late.mobile)), 0, 'also if the newer code has been used')
  t.strictSame(await readJson(recordKey(late.mobile)), done)
})

t.test('a code whose record is lost is restored, but not after the lease: then it may have been used', async (t) => {
  for (const [ageMs, count] of [
    [leaseMs - slackMs, 2],
    [leaseMs, 0]
  ] as const) {
    const { mobile, claim: claimed } = await claimIssued()
    await redis.del(recordKey(mobile))
    const claimId = `${Number(claimed.claimId) - ageMs * 1_000}`
    await codes.restore({ ...claimed, claimId }, true)
    t.equal(await redis.exists(codeKey(mobile), recordKey(mobile)), count)
  }
})

t.test('a reclaimed code whose record is lost is not restored: the earlier request may have used it', async (t) => {
  const { mobile, code, claim: first } = await claimIssued()
  await ageClaim(mobile, leaseMs)
  const second = await claim(mobile, code)
  const newer = await claim(mobile, (await issue(mobile)).code)
  await codes.complete(first, '7')
  await codes.discard(newer)
  await codes.restore(second, false)
  t.strictSame(await keysOf(mobile), [])
})

t.test('a reclaim keeps the MAC of the claim, so a rotation of the secret brings no used code back', async (t) => {
  const [former, current] = ['former'.padEnd(32, '.'), 'current'.padEnd(32, '.')]
  const before = await buildCodes(t, config({ SESSION_SECRET: `${former},${current}` }))
  const after = await buildCodes(t, config({ SESSION_SECRET: `${current},${former}` }))
  const mobile = newMobile()
  const code = await issueCode(mobile)
  const claimBy = (instance: typeof codes) => claim(mobile, code, 'sign_up', address, instance)
  const slow = await claimBy(before)
  await ageClaim(mobile, leaseMs)
  await after.complete(await claimBy(after), '7')
  await before.restore(slow, true)
  t.equal(await redis.exists(codeKey(mobile)), 0)
  t.equal((await readJson(recordKey(mobile))).state, 'done')
})

t.test('a discard leaves nothing of the code', async (t) => {
  const { mobile, claim: claimed } = await claimIssued()
  t.strictSame(await codes.discard(claimed), { wasTakenOver: false })
  t.strictSame(await keysOf(mobile), [])
})

t.test('a success leaves its record for 300 s, and gives all guesses and the units of each message back', async (t) => {
  await redis.set('sms_codes:all', 5, 'EX', 3_000)
  const mobile = newMobile()
  await issue(mobile)
  const { code } = await issue(mobile)
  t.equal((await presentCode(mobile, 'wrong')).state, 'wrong')
  const claimed = await claim(mobile, code)
  usedCount = 0
  await codes.complete(claimed, '7')
  t.equal(usedCount, 1)
  const { claimId: at, mac } = claimed
  t.strictSame(await readJson(recordKey(mobile)), { state: 'done', mac, at, user_id: '7' })
  await checkTtl(t, recordKey(mobile), recordTtlMs)
  t.strictSame(await keysOf(mobile), [recordKey(mobile)])
  t.equal(await redis.get('sms_codes:all'), '3')
})

t.test('the units of a code are refunded once, also if a reclaim succeeds or the first success is lost', async (t) => {
  const { mobile, code, claim: first } = await claimIssued()
  await ageClaim(mobile, leaseMs)
  const second = await claim(mobile, code)
  await redis.set('sms_codes:all', 5, 'EX', 3_000)
  usedCount = 0
  await codes.complete(second, '7')
  t.strictSame([await redis.get('sms_codes:all'), usedCount], ['4', 1])
  await codes.complete(first, '7')
  t.strictSame([await redis.get('sms_codes:all'), usedCount], ['4', 1])
})

t.test('a success with a code of another service refunds nothing', async (t) => {
  const mobile = newMobile()
  const claimed = await claim(mobile, await issueCode(mobile))
  await redis.set('sms_codes:all', 5, 'EX', 3_000)
  usedCount = 0
  await codes.complete(claimed, '8')
  t.strictSame([await redis.get('sms_codes:all'), usedCount], ['5', 0])
})

t.test('a success keeps the claim record of another code, unless that code has been used', async (t) => {
  for (const isUnknown of [false, true]) {
    const { mobile, claim: older } = await claimIssued()
    const newerCode = await issueCode(mobile)
    const newer = await claim(mobile, newerCode)
    if (isUnknown) {
      await codes.restore(newer, true)
      await redis.del(codeKey(mobile))
    }
    await codes.complete(older, '7')
    await ageClaim(mobile, leaseMs)
    t.match(await presentCode(mobile, newerCode), { state: 'claimed', isReclaim: true })
  }
  const { mobile, claim: older } = await claimIssued()
  await codes.complete(await claim(mobile, await issueCode(mobile)), '6')
  await codes.complete(older, '7')
  t.match(await presentCode(mobile, older.code), { state: 'done', userId: '7' })
})

t.test(
  'a success uses up its code and the issue if another request has put them back, but no newer ones',
  async (t) => {
    const { mobile, claim: first } = await claimIssued()
    await ageClaim(mobile, leaseMs)
    const second = await claim(mobile, first.code)
    await codes.restore(second, false)
    t.equal(await redis.exists(codeKey(mobile), issueKey(mobile)), 2)
    await codes.complete(first, '7')
    t.strictSame(await keysOf(mobile), [recordKey(mobile)])

    const { claim: older } = await claimIssued()
    await issue(older.mobile)
    await codes.complete(older, '7')
    t.equal(await redis.exists(codeKey(older.mobile), issueKey(older.mobile)), 2)
  }
)

t.test('one replay runs at a time, until it ends or the lease expires, and keeps the TTL of the record', async (t) => {
  const { mobile, code, claim: claimed } = await completeIssued()
  const { claimId: at, mac } = claimed
  await redis.pexpire(recordKey(mobile), 100_000)
  const before = await redisNow()
  const first = await replay(mobile, code)
  const after = await redisNow()
  t.strictSame(first, { state: 'done', mobile, userId: '7', claimId: at })
  const { checking, ...record } = await readJson(recordKey(mobile))
  t.strictSame(record, { state: 'done', mac, at, user_id: '7' })
  t.ok(before <= Number(checking) && Number(checking) <= after)
  await checkTtl(t, recordKey(mobile), 100_000)
  t.strictSame(await presentCode(mobile, code), { state: 'in_progress' })

  await codes.endReplay(first, { passwordWasWrong: false })
  t.strictSame(await readJson(recordKey(mobile)), { ...record, passwords: 0 })
  await checkTtl(t, recordKey(mobile), 100_000)
  await replay(mobile, code)
  await ageClaim(mobile, leaseMs - slackMs)
  t.equal((await presentCode(mobile, code)).state, 'in_progress')
  await ageClaim(mobile, slackMs)
  await codes.endReplay(await replay(mobile, code), { passwordWasWrong: true })
  t.equal((await readJson(recordKey(mobile))).passwords, 1)
  await codes.endReplay(await replay(mobile, code), { passwordWasWrong: false })
  t.equal((await readJson(recordKey(mobile))).passwords, 1)
  await codes.endReplay(await replay(mobile, code), { passwordWasWrong: true })
  t.strictSame(await keysOf(mobile), [], 'the second wrong password deletes the record')
})

t.test('a replay cannot end, and a lost row not reopen, what has come after it', async (t) => {
  const { mobile, code } = await completeIssued()
  const older = await replay(mobile, code)
  const newer = await claim(mobile, (await issue(mobile)).code)
  const checkUnchanged = async (state: string) => {
    const record = await readJson(recordKey(mobile))
    t.equal(record.state, state)
    await codes.endReplay(older, { passwordWasWrong: true })
    t.equal(await codes.reopen(older), undefined)
    t.strictSame(await readJson(recordKey(mobile)), record)
  }
  await checkUnchanged('pending')
  await codes.complete(newer, '8')
  await checkUnchanged('done')
  await redis.del(recordKey(mobile))
  await codes.endReplay(older, { passwordWasWrong: true })
  t.equal(await codes.reopen(older), undefined)
  t.strictSame(await keysOf(mobile), [])
})

t.test('a code whose row is lost is claimed again by its record only, for 300 s', async (t) => {
  const { mobile, code, claim: claimed } = await completeIssued()
  await redis.pexpire(recordKey(mobile), 100_000)
  const reopened = await codes.reopen(await replay(mobile, code))
  const { mac } = claimed
  t.match(reopened, { mobile, code: '', mac, ttlMs: 0, isReclaim: true, issue: '{}', claimId: /^\d{16}$/ })
  t.not(reopened?.claimId, claimed.claimId)
  const record = { state: 'pending', mac, at: reopened?.claimId, ttl: 0, issue: {} }
  t.strictSame(await readJson(recordKey(mobile)), record)
  await checkTtl(t, recordKey(mobile), recordTtlMs)
  t.equal((await presentCode(mobile, code)).state, 'in_progress')
})

t.test('a reclaim that is conceded is done for 300 s, with one wrong password', async (t) => {
  const { mobile, claim: claimed } = await claimIssued(newMobile(), 1_000_000)
  const { claimId: at, mac } = claimed
  const record = { state: 'done', mac, at, user_id: '7', passwords: 1 }
  await codes.concede(claimed, '7')
  t.strictSame(await readJson(recordKey(mobile)), record)
  await checkTtl(t, recordKey(mobile), recordTtlMs)
  await redis.del(recordKey(mobile))
  await codes.concede(claimed, '7')
  t.strictSame(await readJson(recordKey(mobile)), record, 'also if the record is lost')
})

t.test('a wrong code is counted for the guesser and for all, in windows that begin with the first', async (t) => {
  const mobile = newMobile()
  await issueCode(mobile)
  const before = await redisNow()
  await presentCode(mobile, 'wrong')
  const after = await redisNow()
  const first = await redis.hgetall(guessesKey(mobile))
  t.strictSame(Object.keys(first).sort(), [address, 'all'])
  const [count, since = ''] = `${first.all}`.split(' ')
  t.strictSame([count, first[address]], ['1', first.all])
  t.match(since, /^\d{16}$/)
  t.ok(before <= Number(since) && Number(since) <= after)
  await checkTtl(t, guessesKey(mobile), 86_400_000)

  await redis.pexpire(guessesKey(mobile), 100_000)
  await presentCode(mobile, 'wrong')
  t.strictSame(await redis.hgetall(guessesKey(mobile)), { [address]: `2 ${since}`, all: `2 ${since}` })
  await checkTtl(t, guessesKey(mobile), 86_400_000)

  const ended = Number(since) - 3_600_000_000
  await redis.hset(guessesKey(mobile), { [address]: `5 ${ended}`, all: `2 ${ended}` })
  t.equal((await presentCode(mobile, 'wrong')).state, 'wrong', 'the window of the guesser has ended')
  const next = await redis.hgetall(guessesKey(mobile))
  t.match(next, { [address]: /^1 \d{16}$/, all: `3 ${ended}` })
  t.ok(`${next[address]}` > `1 ${since}`, 'a new window has begun')
})

t.test('a wrong code is counted while there is a record, of which the code could be guessed', async (t) => {
  const { mobile, claim: claimed } = await claimIssued()
  await codes.restore(claimed, true)
  await redis.del(codeKey(mobile), issueKey(mobile))
  t.equal((await presentCode(mobile, 'wrong')).state, 'wrong')
  t.equal(await redis.exists(guessesKey(mobile)), 1)

  const { mobile: completed } = await completeIssued()
  t.equal((await presentCode(completed, 'wrong')).state, 'wrong')
  t.equal(await redis.exists(guessesKey(completed)), 1, 'a completed claim can be replayed')
  await redis.del(recordKey(completed), guessesKey(completed))
  t.equal((await presentCode(completed, 'wrong')).state, 'wrong')
  t.strictSame(await keysOf(completed), [], 'without a record there is nothing to guess')
})

t.test('spent guesses are refused until the exact end of the longest window, which is reported', async (t) => {
  const mobile = newMobile()
  const code = await issueCode(mobile)
  const [hour, day] = [3_600, 86_400]

  /** Stores windows that began the given seconds ago. Checks how long the right code is refused, and which budget refuses it. */
  async function checkSpent(guesserAge: number, allAge: number, windowEnd: number, budget: LimitName) {
    const now = await redisNow()
    await redis.hset(guessesKey(mobile), {
      [address]: `5 ${now - guesserAge * 1_000_000}`,
      all: `50 ${now - allAge * 1_000_000}`
    })
    refusals.length = 0
    const result: ClaimResult = await presentCode(mobile, code)
    const passed = ((await redisNow()) - now) / 1_000_000
    const seconds = 'retryAfterSeconds' in result ? result.retryAfterSeconds : 0
    t.equal(result.state, 'spent')
    t.ok(windowEnd - passed <= seconds && seconds <= windowEnd, `${seconds} s of ${windowEnd} s`)
    t.strictSame(refusals, [budget])
  }

  await checkSpent(hour / 2, day, hour / 2, 'guesses_guesser')
  await checkSpent(hour / 2, day - 100, hour / 2, 'guesses_guesser')
  await checkSpent(hour / 2, day / 2, day / 2, 'guesses_mobile')
  await checkSpent(hour, day / 2, day / 2, 'guesses_mobile')
  t.equal(await redis.get(codeKey(mobile)), code)
})

/** Issues a code, and another one for another purpose which replaces it. */
async function issueTwo() {
  const mobile = newMobile()
  const previous = await issue(mobile)
  const previousIssue = await readJson(issueKey(mobile))
  const latest = await issue(mobile, 'password')
  return { mobile, previous: previous.code, previousIssue, latest: latest.code }
}

/** Lets the code that the newest one has replaced expire in some ms, or never. */
async function setReplacedTtl(mobile: string, ms: number | undefined): Promise<void> {
  const issued = await readJson(issueKey(mobile))
  issued.replaced.expires = ms && Math.floor((await redisNow()) / 1_000) + ms
  await redis.set(issueKey(mobile), JSON.stringify(issued), 'KEEPTTL')
}

t.test('a withdrawal puts the previous code and its issue back, with the TTL that is left', async (t) => {
  const { mobile, previous, previousIssue, latest } = await issueTwo()
  const startedAt = Date.now()
  await setReplacedTtl(mobile, 5_000_000)
  await codes.withdraw(mobile, latest)
  t.equal(await redis.get(codeKey(mobile)), previous)
  t.strictSame(await readJson(issueKey(mobile)), previousIssue)
  for (const key of [codeKey(mobile), issueKey(mobile)]) {
    const ttlMs = await redis.pttl(key)
    // This clock and that of Redis are both rounded to milliseconds.
    const passedMs = Date.now() - startedAt + 2
    t.ok(ttlMs <= 5_000_000 && ttlMs >= 5_000_000 - passedMs, `${ttlMs} ms`)
  }
})

t.test('a withdrawal puts a code without a TTL back without one, and no code that has expired', async (t) => {
  const immortal = await issueTwo()
  await setReplacedTtl(immortal.mobile, undefined)
  await codes.withdraw(immortal.mobile, immortal.latest)
  t.equal(await redis.get(codeKey(immortal.mobile)), immortal.previous)
  for (const key of [codeKey(immortal.mobile), issueKey(immortal.mobile)]) t.equal(await redis.pttl(key), -1)

  const { mobile: expired, latest } = await issueTwo()
  await setReplacedTtl(expired, -5_000)
  await codes.withdraw(expired, latest)
  t.strictSame(await keysOf(expired), [])

  const mobile = newMobile()
  await codes.withdraw(mobile, (await issue(mobile)).code)
  t.strictSame(await keysOf(mobile), [], 'there was no previous code')

  const foreign = await issueCode(mobile)
  await codes.withdraw(mobile, (await issue(mobile)).code)
  t.strictSame(await keysOf(mobile), [codeKey(mobile)], 'a code of another service had no issue')
  t.equal(await redis.get(codeKey(mobile)), foreign)

  const orphaned = newMobile()
  await issue(orphaned)
  await redis.del(codeKey(orphaned))
  await codes.withdraw(orphaned, (await issue(orphaned)).code)
  t.strictSame(await keysOf(orphaned), [], 'an issue without its code does not come back')
})

t.test('a withdrawal does not fail in the millisecond in which the previous code expires', async (t) => {
  const mobile = newMobile()
  for (let n = 0; n < 200; n++) {
    // The time until the script runs is between 0 and 5 ms. So in many runs the rest of the life is 0 ms.
    const now = await redisNow()
    const replaced = { code: 'previous', expires: (now + (n % 20) * 250) / 1_000 }
    const issued = { code: 'new', sends: [{ at: `${now}`, network: address }], replaced }
    await redis.set(issueKey(mobile), JSON.stringify(issued))
    await redis.set(codeKey(mobile), 'new')
    await codes.withdraw(mobile, 'new')
    t.not(await redis.get(codeKey(mobile)), 'new')
  }
})

t.test('a withdrawal changes nothing if the code was sent again, replaced or claimed meanwhile', async (t) => {
  /** Withdraws a code after something has happened, and checks that the keys stay as they were. */
  async function checkUnchanged(name: string, happen: (mobile: string, code: string) => Promise<unknown>) {
    const { mobile, latest } = await issueTwo()
    await happen(mobile, latest)
    const state = () => Promise.all([keysOf(mobile), redis.get(codeKey(mobile)), redis.get(issueKey(mobile))])
    const before = await state()
    await codes.withdraw(mobile, latest)
    t.strictSame(await state(), before, name)
  }
  await checkUnchanged('sent again', (mobile) => issue(mobile, 'password'))
  await checkUnchanged('replaced by this service', (mobile) => issue(mobile, 'sign_up'))
  await checkUnchanged('replaced by another service', (mobile) => issueCode(mobile))
  await checkUnchanged('written by another service, too', (mobile) => redis.del(issueKey(mobile)))
  await checkUnchanged('claimed', (mobile, code) => claim(mobile, code, 'password'))
  await checkUnchanged('expired', (mobile) => redis.del(codeKey(mobile)))
})

t.test('a withdrawal puts a code back whose claim has failed since the newer code was issued', async (t) => {
  const { mobile, code, issued, claim: claimed } = await claimIssued(newMobile(), 200_000)
  const { code: newer } = await issue(mobile)
  await codes.restore(claimed, false)
  t.equal(await redis.get(codeKey(mobile)), newer, 'until then the newer code stays')
  for (const key of [codeKey(mobile), issueKey(mobile)]) await checkTtl(t, key, lifeMs)
  await codes.withdraw(mobile, newer)
  t.equal(await redis.get(codeKey(mobile)), code)
  t.strictSame(await readJson(issueKey(mobile)), issued)
  for (const key of [codeKey(mobile), issueKey(mobile)]) await checkTtl(t, key, 200_000)
})

t.test('a replaced code that is claimed again keeps its sends and the life that is left', async (t) => {
  for (const [ms, ttlMs] of [
    [100_000, 100_000],
    [-5_000, 0],
    [undefined, -1]
  ] as const) {
    const { mobile, code, claim: first } = await claimIssued()
    await codes.restore(first, true)
    await issue(mobile)
    const issued = await readJson(issueKey(mobile))
    await issue(mobile, 'password')
    await setReplacedTtl(mobile, ms)
    const second = await claim(mobile, code)
    if (ttlMs <= 0) t.equal(second.ttlMs, ttlMs)
    else t.ok(second.ttlMs <= ttlMs && second.ttlMs > ttlMs - slackMs, `${second.ttlMs} ms of ${ttlMs} ms`)
    t.equal(issued.sends.length, 2)
    t.strictSame(JSON.parse(second.issue), withoutCode(issued))
  }
})

t.test(
  'a withdrawal gives a code whose claim has failed the life that it had: none, or one without an end',
  async (t) => {
    for (const [ttlMs, keys] of [
      [0, 0],
      [-1, 2]
    ] as const) {
      const { mobile, claim: claimed } = await claimIssued()
      const { code: newer } = await issue(mobile)
      await codes.restore({ ...claimed, ttlMs }, false)
      await codes.withdraw(mobile, newer)
      t.equal(await redis.exists(codeKey(mobile), issueKey(mobile)), keys)
      if (keys > 0) t.strictSame([await redis.pttl(codeKey(mobile)), await redis.pttl(issueKey(mobile))], [-1, -1])
    }
  }
)

t.test('a failed claim does not displace the code that a withdrawal puts back already', async (t) => {
  const { mobile, claim: claimed } = await claimIssued()
  const second = await issueCode(mobile)
  const { code: newest } = await issue(mobile)
  await codes.restore(claimed, false)
  await codes.withdraw(mobile, newest)
  t.equal(await redis.get(codeKey(mobile)), second)
})

t.test('a withdrawal puts no code back that is claimed again or used', async (t) => {
  /** Claims a code, restores it although its row may be committed, and issues a newer one. */
  async function replaceRestored() {
    const { mobile, code, claim: first } = await claimIssued()
    await codes.restore(first, true)
    return { mobile, code, first, newer: (await issue(mobile, 'password')).code }
  }
  /** Withdraws the newer code, and checks that none is left. */
  async function checkNoneIsBack(mobile: string, newer: string) {
    await codes.withdraw(mobile, newer)
    t.strictSame(
      (await keysOf(mobile)).filter((key) => key !== recordKey(mobile)),
      []
    )
  }
  const claimed = await replaceRestored()
  await claim(claimed.mobile, claimed.code)
  t.equal(await redis.get(codeKey(claimed.mobile)), claimed.newer)
  for (const key of [codeKey(claimed.mobile), issueKey(claimed.mobile)]) await checkTtl(t, key, lifeMs)
  await checkNoneIsBack(claimed.mobile, claimed.newer)

  const used = await replaceRestored()
  await codes.complete(used.first, '7')
  await checkNoneIsBack(used.mobile, used.newer)
})

t.test('a claim is identified by 16 digits, also in the first tenth of a second', async (t) => {
  // There the microseconds of Redis have leading zeros.
  let claimId = ''
  do {
    const [, microseconds] = await redis.time()
    await sleep(Math.ceil((1_000_000 - Number(microseconds)) / 1_000))
    claimId = (await claimIssued()).claim.claimId
  } while (claimId.length === 16 && claimId[10] !== '0')
  t.match(claimId, /^\d{10}0\d{5}$/)
})
