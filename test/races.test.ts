import { verify } from '@node-rs/argon2'
import t from 'tap'
import { build, holdInserts, holdRedisWrites, issueCode, post, redis, signUpBody, until, userRow } from './helper.js'

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
  const body = await signUpBody()
  // The barrier: Redis executes nothing until all 50 commands have arrived on the two connections.
  const writes = await holdRedisWrites()
  const replies = Array.from({ length: 50 }, (_, n) => send(n, body))
  const command = `*2\r\n$6\r\ngetdel\r\n$20\r\nsms_code_${body.mobile}\r\n`
  await until(async () => {
    const waiting = [...String(await redis.client('LIST')).matchAll(/ flags=b.* qbuf=(\d+)/g)]
    // Of each connection the first command is held, and 24 wait behind it.
    return waiting.length === 2 && waiting.every(([, bytes]) => Number(bytes) >= 24 * command.length)
  })
  await writes.release()
  t.strictSame(await statuses(replies), { 201: 1, 422: 49 })
  t.equal((await userRow(body.mobile)).length, 1)
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
