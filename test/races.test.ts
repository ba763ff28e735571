import { verify } from '@node-rs/argon2'
import t from 'tap'
import { build, holdInserts, issueCode, post, signUpBody, until, userRow } from './helper.js'

/** Two instances of the service, which take the requests in turn. */
async function twoInstances(t: Parameters<typeof build>[0]) {
  const env = { STORE_TIMEOUT_MS: '30000', PG_POOL_MAX: '25' }
  const [even, odd] = [await build(t, env), await build(t, env)]
  return (n: number, body: object) => post(n % 2 === 0 ? even : odd, body)
}

const statuses = async (replies: ReturnType<typeof post>[]) => {
  const counts: Record<number, number> = {}
  for (const { statusCode } of await Promise.all(replies)) counts[statusCode] = (counts[statusCode] ?? 0) + 1
  return counts
}

t.test('G1: of 50 simultaneous sign-ups with one code, on two instances, exactly one completes', async (t) => {
  const send = await twoInstances(t)
  const first = await signUpBody()
  const bodies = await Promise.all(Array.from({ length: 50 }, () => signUpBody({ mobile: first.mobile })))
  await issueCode(first.mobile, first.sms_code)
  // The barrier: whoever takes the code stands before the table until all others have their answer.
  const inserts = await holdInserts()
  let answered = 0
  const replies = bodies.map((body, n) =>
    send(n, { ...body, sms_code: first.sms_code }).then((reply) => {
      answered++
      return reply
    })
  )
  await until(async () => answered === 49)
  await inserts.release()
  t.strictSame(await statuses(replies), { 201: 1, 503: 49 })
  t.equal((await userRow(first.mobile)).length, 1)
})

t.test('G5: of 50 simultaneous sends of one request each ends, asked again, in the same success', async (t) => {
  const send = await twoInstances(t)
  const body = await signUpBody()
  const replies = await Promise.all(
    Array.from({ length: 50 }, async (_, n) => {
      let reply = await send(n, body)
      while (reply.statusCode === 503) {
        t.strictSame([reply.json().errno, reply.headers['retry-after']], ['4500', '1'])
        reply = await send(n, body)
      }
      return reply
    })
  )
  const [row] = await userRow(body.mobile)
  for (const reply of replies) {
    t.strictSame([reply.statusCode, reply.json().data.user_id, reply.json().data.session], [201, row.id, true])
  }
  const replayed = replies.filter(({ headers }) => headers['idempotent-replayed'] === 'true')
  t.equal(replayed.length, 49)
})

t.test('G2: of 50 simultaneous sign-ups of one mobile with 50 passwords exactly one gets 201', async (t) => {
  const send = await twoInstances(t)
  const first = await signUpBody()
  const bodies = await Promise.all(Array.from({ length: 50 }, () => signUpBody({ mobile: first.mobile })))
  // The barrier: 50 INSERTs, each with a code of its own, stand before the table.
  const inserts = await holdInserts()
  const replies: ReturnType<typeof post>[] = []
  for (const [n, body] of bodies.entries()) {
    await issueCode(first.mobile, body.sms_code)
    replies.push(send(n, body))
    await inserts.arrived(n + 1)
  }
  await inserts.release()

  t.strictSame(await statuses(replies), { 201: 1, 409: 49 })
  const winner = (await Promise.all(replies)).findIndex(({ statusCode }) => statusCode === 201)
  const rows = await userRow(first.mobile)
  t.equal(rows.length, 1)
  t.ok(await verify(rows[0].password_hash, bodies[winner]?.password ?? ''), 'the row is the winner’s')
})
