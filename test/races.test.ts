import { EventEmitter, once } from 'node:events'
import { verify } from '@node-rs/argon2'
import t from 'tap'
import { StoreUnavailable } from '#src/stores/store-unavailable.js'
import { client, type Reply, statusAndErrno } from '../testkit/client.js'
import { claimKey, leaseMsOf, type SignUpBody, startTestbed } from '../testkit/testbed.js'
import { retried, until } from '../testkit/until.js'

/*
 * Many requests for one mobile, at the same time or one after the other: G1, G2, G4 and G5. docs/guarantees.md explains the
 * protocol, test/codes.test.ts has its scripts, and test/faults.test.ts every round trip with every fault.
 */

const testbed = await startTestbed(t)
const { build, buildHashingAfter, config, cookieOf, holdInserts, issueCode, openProxy, postgres, redis } = testbed
const { ageClaim, readClaim, signUpBody, untilHeld, userRows } = testbed

const leaseMs = leaseMsOf(config())

async function failToHash(): Promise<never> {
  throw new Error('no memory for a hash')
}

/** What an application does before each hash. A test replaces it. */
let beforeHash: () => Promise<unknown> = failToHash
const proxy = await openProxy(t, 'DATABASE_URL')

// Connections for all INSERTs at a barrier.
const app = await build(t, { PG_POOL_MAX: '20' })
const instance = client(app)
const other = client(await build(t, { PG_POOL_MAX: '20' }))
const slow = client(await buildHashingAfter(t, () => beforeHash()))
/** A test causes faults in its round trips to Postgres. */
const faulty = client(await build(t, { DATABASE_URL: proxy.url }))

/** Sends the sign-up of an index to one of two instances. */
const signUpOn = (index: number, body: object) => (index % 2 === 0 ? instance : other).signUp(body)

const deleteUser = (mobile: string) => postgres.query('DELETE FROM users WHERE mobile = $1', [mobile])
const withPassword = <T extends object>(body: T, password = 'another password') => ({
  ...body,
  password,
  password2: password
})
const isReplay = ({ headers }: Reply) => headers['idempotent-replayed'] === 'true'

function countStatuses(replies: Reply[]): Record<number, number> {
  const counts: Record<number, number> = {}
  for (const { statusCode } of replies) counts[statusCode] = (counts[statusCode] ?? 0) + 1
  return counts
}

/** Sends a sign-up whose INSERT is committed, but whose instance does not hear it. */
async function signUpUnheard(body: SignUpBody): Promise<void> {
  proxy.strike('insert_user', { kind: 'cut', bytes: 3 })
  if ((await faulty.signUp(body)).statusCode !== 503) throw new Error('the instance has heard of its INSERT')
  await until('the row is committed', async () => (await userRows(body.mobile)).length === 1)
}

t.test('G1: of 40 simultaneous sign-ups with one code, on two instances, exactly one succeeds', async (t) => {
  const { mobile, sms_code } = await signUpBody()
  // The sign-up that claims the code waits at the barrier until all others are answered.
  const inserts = await holdInserts(t)
  let answered = 0
  const replies = Promise.all(
    Array.from({ length: 40 }, async (_, index) => {
      const reply = await signUpOn(index, withPassword({ mobile, sms_code }, `password number ${index}`))
      answered++
      return reply
    })
  )
  await until('39 sign-ups are answered', () => answered === 39)
  t.strictSame(statusAndErrno(await instance.signUp(withPassword({ mobile, sms_code: 'wrong' }))), [422, '4004'])
  await inserts.release()
  t.strictSame(countStatuses(await replies), { 201: 1, 503: 39 })
  t.equal((await userRows(mobile)).length, 1)
})

t.test('G5: 20 simultaneous copies of one request all end in the same success, each with a session', async (t) => {
  const body = await signUpBody()
  const replies = await Promise.all(
    Array.from({ length: 20 }, (_, index) =>
      retried(async () => {
        const reply = await signUpOn(index, body)
        if (reply.statusCode === 503) t.strictSame([reply.json().errno, reply.headers['retry-after']], ['4500', '1'])
        return reply
      })
    )
  )
  const [row] = await userRows(body.mobile)
  for (const reply of replies) {
    t.match([reply.statusCode, reply.json()], [201, { data: { user_id: row.id, session: true } }])
  }
  t.equal(replies.filter(isReplay).length, 19)
  t.equal(new Set(replies.map(cookieOf)).size, 20, 'each has a session of its own')
  for (const { whoAmI } of [instance, other]) {
    t.equal((await whoAmI(cookieOf(replies[0] as Reply))).json().data.user_id, row.id)
  }
})

t.test('G2: of 40 simultaneous sign-ups of one mobile with 40 codes and passwords, exactly one succeeds', async (t) => {
  const { mobile } = await signUpBody()
  const bodies = await Promise.all(Array.from({ length: 40 }, () => signUpBody({ mobile })))
  const inserts = await holdInserts(t)
  const pending: Promise<Reply>[] = []
  for (const [index, body] of bodies.entries()) {
    await issueCode(mobile, body.sms_code)
    pending.push(signUpOn(index, body))
    await untilHeld({ mobile })
  }
  await inserts.arrived(40)
  await inserts.release()

  const replies = await Promise.all(pending)
  t.strictSame(countStatuses(replies), { 201: 1, 409: 39 })
  const winner = bodies[replies.findIndex(({ statusCode }) => statusCode === 201)]
  const rows = await userRows(mobile)
  t.equal(rows.length, 1)
  t.ok(await verify(rows[0].password_hash, winner?.password ?? ''), 'the row has the password of that sign-up')
})

t.test('G1: of two requests that hold a code one after the other, one signs up, and both learn it', async (t) => {
  for (const isSamePassword of [true, false]) {
    const barrier = new EventEmitter()
    beforeHash = () => once(barrier, 'open')
    const body = await signUpBody()
    const first = slow.signUp(body)
    await untilHeld(body)
    await ageClaim(body.mobile, leaseMs)
    const second = await instance.signUp(isSamePassword ? body : withPassword(body))
    t.equal(second.statusCode, 201)
    await until('the slow request is at the barrier', () => barrier.listenerCount('open') === 1)
    const claim = await readClaim(body.mobile)
    barrier.emit('open')
    const reply = await first
    t.equal(reply.statusCode, isSamePassword ? 201 : 409)
    if (isSamePassword) t.equal(reply.json().data.user_id, second.json().data.user_id)
    t.equal((await userRows(body.mobile)).length, 1)
    t.strictSame(await readClaim(body.mobile), claim, 'the slow one does not hold the code any more')
  }
})

t.test('G5: the hash of the row decides a repeat, also after an INSERT that nobody heard of', async (t) => {
  const { passwords } = app.mobileSignup
  for (const signUpFirst of [instance.signUp, signUpUnheard]) {
    const body = await signUpBody()
    await signUpFirst(body)
    t.strictSame(statusAndErrno(await retried(() => instance.signUp(withPassword(body)))), [409, '4003'])
    const { verify } = passwords
    passwords.verify = failToHash
    for (let n = 0; n < 2; n++) t.strictSame(statusAndErrno(await instance.signUp(body)), [500, '4500'])
    passwords.verify = verify
    const repeat = await instance.signUp(body)
    t.strictSame([repeat.statusCode, isReplay(repeat)], [201, true], 'after one wrong password, and failures of ours')
    t.strictSame(statusAndErrno(await instance.signUp(withPassword(body))), [409, '4003'])
    t.strictSame(statusAndErrno(await instance.signUp(body)), [422, '4004'], 'after the second wrong password')
    t.equal((await userRows(body.mobile)).length, 1)
  }
})

t.test('G8: of many simultaneous repeats with wrong passwords, two are verified', async (t) => {
  const body = await signUpBody()
  await instance.signUp(body)
  const replies = await Promise.all(
    Array.from({ length: 20 }, (_, n) => retried(() => signUpOn(n, withPassword(body, `wrong password ${n}`))))
  )
  t.strictSame(countStatuses(replies), { 409: 2, 422: 18 })
})

t.test('G5: the repeat of a conflict is a conflict, whatever its password and Postgres say', async (t) => {
  const body = await signUpBody()
  await instance.signUp(body)
  const second = await signUpBody({ mobile: body.mobile })
  t.strictSame(statusAndErrno(await instance.signUp(second)), [409, '4003'])
  await deleteUser(body.mobile)
  for (const repeat of [second, withPassword(second)]) {
    t.strictSame(statusAndErrno(await other.signUp(repeat)), [409, '4003'])
  }
  t.strictSame(await userRows(body.mobile), [])

  const reset = await signUpBody()
  for (let n = 0; n < 2; n++) t.strictSame(statusAndErrno(await instance.resetPassword(reset)), [422, '4004'])
  t.equal((await readClaim(reset.mobile)).used_by, '', 'a reset')
})

t.test('G5: if Postgres has lost the row, the same request signs up again, with a new id, and once', async (t) => {
  const body = await signUpBody()
  const lost = await instance.signUp(body)
  await deleteUser(body.mobile)
  proxy.strike('insert_user', { kind: 'reset' })
  t.strictSame(statusAndErrno(await faulty.signUp(body)), [503, '4001'], 'G4: a failure meanwhile costs no code')

  const replies = await Promise.all(Array.from({ length: 8 }, (_, n) => retried(() => signUpOn(n, body))))
  const [row, ...others] = await userRows(body.mobile)
  t.strictSame(others, [])
  t.not(row.id, lost.json().data.user_id)
  for (const reply of replies) {
    t.match([reply.statusCode, reply.json()], [201, { data: { user_id: row.id, session: true } }])
  }
  t.equal(replies.filter(isReplay).length, 7, 'one of them writes the row, the others repeat it')
  t.equal((await instance.whoAmI(cookieOf(lost))).statusCode, 401, 'the session of the lost user has ended')

  const reset = await signUpBody({ mobile: body.mobile })
  t.equal((await instance.resetPassword(reset)).statusCode, 200)
  await deleteUser(body.mobile)
  t.strictSame(statusAndErrno(await instance.resetPassword(reset)), [422, '4004'], 'a reset is not repeated')
})

t.test('a repeat that finds no row on a former primary does not log its user out', async (t) => {
  const { users } = app.mobileSignup
  const { find, insert } = users
  const body = await signUpBody()
  const first = await instance.signUp(body)
  users.find = async () => undefined
  // A former primary refuses writes.
  users.insert = () => Promise.reject(new StoreUnavailable('postgres'))
  t.strictSame(statusAndErrno(await instance.signUp(body)), [503, '4001'])
  // One that does not know it yet has no row, but its INSERT conflicts, for example because it reads from a replica.
  users.insert = insert
  t.strictSame(statusAndErrno(await instance.signUp(body)), [503, '4500'])
  users.find = find
  const retry = await instance.signUp(body)
  t.match([retry.statusCode, retry.json()], [201, first.json()])
  t.equal((await instance.whoAmI(cookieOf(first))).statusCode, 200)
})

t.test('G4: after a failure before the INSERT, the same request works at once, for as long as the code', async (t) => {
  beforeHash = failToHash
  const body = await signUpBody()
  await redis.pexpire(`sms_code_${body.mobile}`, 3_000_000)
  t.strictSame(statusAndErrno(await slow.signUp(body)), [500, '4500'])
  t.match(await readClaim(body.mobile), { until: 0, may_have_written: undefined })
  t.ok((await redis.pttl(claimKey(body.mobile))) > 2_900_000)
  t.equal((await instance.signUp(withPassword(body))).statusCode, 201, 'also with another password')
})

t.test('G4: a full Redis refuses to hold a code, or to release it, and costs nobody a code', async (t) => {
  const fillRedis = () => redis.config('SET', 'maxmemory', '1')
  const emptyRedis = () => redis.config('SET', 'maxmemory', '0')
  t.teardown(emptyRedis)
  const body = await signUpBody()
  await fillRedis()
  t.strictSame(statusAndErrno(await instance.signUp(body)), [503, '4001'])
  t.equal(await redis.get(`sms_code_${body.mobile}`), body.sms_code)
  await emptyRedis()

  beforeHash = () => fillRedis().then(failToHash)
  t.strictSame(statusAndErrno(await slow.signUp(body)), [500, '4500'])
  await emptyRedis()
  t.strictSame(statusAndErrno(await instance.signUp(body)), [503, '4500'])
  await ageClaim(body.mobile, leaseMs)
  t.equal((await instance.signUp(body)).statusCode, 201)
})
