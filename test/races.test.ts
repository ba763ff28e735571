import { verify } from '@node-rs/argon2'
import t, { type Test } from 'tap'
import { client, type Reply, statusAndErrno } from '../testkit/client.js'
import { startTestbed } from '../testkit/testbed.js'
import { until } from '../testkit/until.js'

const { build, holdInserts, issueCode, signUpBody, untilHeld, userRows } = await startTestbed(t)

/** Builds two instances, and returns a function that sends the sign-up of an index to one of them. */
async function buildTwoInstances(t: Test) {
  // A connection for each of the 50 sign-ups, and a timeout that no wait at the barrier reaches.
  const env = { PG_POOL_MAX: '25', HASH_THREADS: '2' }
  const [even, odd] = [client(await build(t, env)), client(await build(t, env))]
  return (index: number, body: object) => (index % 2 === 0 ? even : odd).signUp(body)
}

function countStatuses(replies: Reply[]): Record<number, number> {
  const counts: Record<number, number> = {}
  for (const { statusCode } of replies) counts[statusCode] = (counts[statusCode] ?? 0) + 1
  return counts
}

t.test('G1: of 50 simultaneous sign-ups with one code, on two instances, exactly one succeeds', async (t) => {
  const signUp = await buildTwoInstances(t)
  const { mobile, sms_code } = await signUpBody()
  const bodies = await Promise.all(Array.from({ length: 50 }, () => signUpBody({ mobile })))
  await issueCode(mobile, sms_code)
  // The sign-up that claims the code waits at the barrier until all others are answered.
  const inserts = await holdInserts(t)
  let answered = 0
  const replies = Promise.all(
    bodies.map(async (body, index) => {
      const reply = await signUp(index, { ...body, sms_code })
      answered++
      return reply
    })
  )
  await until('49 sign-ups are answered', () => answered === 49)
  await inserts.release()
  t.strictSame(countStatuses(await replies), { 201: 1, 503: 49 })
  t.equal((await userRows(mobile)).length, 1)
})

t.test('G5: 50 simultaneous copies of one request all end in the same success, if they are retried', async (t) => {
  const signUp = await buildTwoInstances(t)
  const body = await signUpBody()
  const replies = await Promise.all(
    Array.from({ length: 50 }, async (_, index) => {
      let reply = await signUp(index, body)
      await until(`request ${index} is not answered 503`, async () => {
        if (reply.statusCode !== 503) return true
        t.strictSame([...statusAndErrno(reply), reply.headers['retry-after']], [503, '4500', '1'])
        reply = await signUp(index, body)
        return false
      })
      return reply
    })
  )
  const [row] = await userRows(body.mobile)
  for (const reply of replies) {
    const { user_id, session } = reply.json().data
    t.strictSame([reply.statusCode, user_id, session], [201, row.id, true])
  }
  t.equal(replies.filter(({ headers }) => headers['idempotent-replayed'] === 'true').length, 49)
})

t.test('G2: of 50 simultaneous sign-ups of one mobile with 50 passwords, exactly one succeeds', async (t) => {
  const signUp = await buildTwoInstances(t)
  const { mobile } = await signUpBody()
  const bodies = await Promise.all(Array.from({ length: 50 }, () => signUpBody({ mobile })))
  // All 50 INSERTs, each of a sign-up with its own code, wait at the barrier.
  const inserts = await holdInserts(t)
  const pending: Promise<Reply>[] = []
  for (const [index, body] of bodies.entries()) {
    await issueCode(mobile, body.sms_code)
    pending.push(signUp(index, body))
    await untilHeld({ mobile })
  }
  await inserts.arrived(50)
  await inserts.release()

  const replies = await Promise.all(pending)
  t.strictSame(countStatuses(replies), { 201: 1, 409: 49 })
  const winner = bodies[replies.findIndex(({ statusCode }) => statusCode === 201)]
  const rows = await userRows(mobile)
  t.equal(rows.length, 1)
  t.ok(await verify(rows[0].password_hash, winner?.password ?? ''), 'the row has the password of that sign-up')
})
