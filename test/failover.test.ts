import t, { type Test } from 'tap'
import { client } from '../testkit/client.js'
import { ReplicatedPostgres } from '../testkit/replicated-postgres.js'
import { type SignUpBody, startTestbed } from '../testkit/testbed.js'
import { retried, until } from '../testkit/until.js'

/*
 * A primary that is killed, and replaced by its standby. docs/guarantees.md says what Postgres may lose then.
 */

const { build, cookieOf, signUpBody } = await startTestbed(t)

/** The lease of a claim is short, because a killed primary leaves claims behind. */
const impatient = { STORE_TIMEOUT_MS: '1000', HASH_MAX_WAIT_MS: '500', SMS: 'off' }

async function start(t: Test, mode: 'synchronous' | 'asynchronous') {
  const postgres = await ReplicatedPostgres.start(mode)
  t.teardown(() => postgres.stop())
  const app = await build(t, { ...impatient, DATABASE_URL: postgres.address.url })
  const { signUp } = client(app)

  /** Signs up with retries. @returns the id in the answer */
  async function idOf(body: SignUpBody): Promise<string> {
    const reply = await retried(() => signUp(body))
    t.equal(reply.statusCode, 201, reply.body)
    return reply.json().data.user_id
  }
  /** @returns the id of the row of each mobile */
  async function rows(): Promise<Map<string, string>> {
    const found = await postgres.query<{ id: string; mobile: string }>('SELECT id, mobile FROM users')
    return new Map(found.map(({ id, mobile }) => [mobile, id]))
  }
  return { postgres, app, idOf, rows }
}

const newBodies = (count: number) => Promise.all(Array.from({ length: count }, () => signUpBody()))

t.test('G2, G3: with synchronous replication a failover loses no answered sign-up', async (t) => {
  const { postgres, idOf, rows } = await start(t, 'synchronous')
  const ids = new Map<string, string>()
  let isOver = false
  async function signUpInTurn() {
    while (!isOver) {
      const body = await signUpBody()
      ids.set(body.mobile, await idOf(body))
    }
  }
  t.teardown(() => {
    isOver = true
  })
  const clients = Array.from({ length: 8 }, signUpInTurn)
  for (let failovers = 0; failovers < 2; failovers++) {
    if (failovers > 0) await postgres.addStandby()
    const answered = ids.size
    await until('people sign up', () => ids.size >= answered + 20)
    await postgres.failOver()
  }
  const answered = ids.size
  await until('people sign up again, without a restart', () => ids.size >= answered + 20)
  isOver = true
  await Promise.all(clients)
  t.strictSame(new Map([...(await rows())].sort()), new Map([...ids].sort()))
})

t.test('G2: what asynchronous replication loses can be done again, and no id is given twice', async (t) => {
  const { postgres, app, idOf, rows } = await start(t, 'asynchronous')
  const signUpAll = async (bodies: SignUpBody[]) => {
    const ids: string[] = []
    for (const body of bodies) ids.push(await idOf(body))
    return ids
  }
  const kept = await newBodies(5)
  const keptIds = await signUpAll(kept)
  await until('the standby has them', async () => {
    const [row] = await postgres.query<{ has: boolean }>(
      'SELECT replay_lsn = pg_current_wal_lsn() AS has FROM pg_stat_replication'
    )
    return row?.has === true
  })
  await postgres.stopReplicating()
  // More than the 32 values that Postgres logs ahead.
  const lost = await newBodies(100)
  const lostIds = await signUpAll(lost)
  const [lostBody = await signUpBody()] = lost
  const { signUp, whoAmI } = client(app)
  const cookie = cookieOf(await retried(() => signUp(lostBody)))
  await postgres.failOver()
  await idOf(await signUpBody())
  t.equal((await rows()).size, kept.length + 1, 'the rows are lost')

  const newIds = await signUpAll(await newBodies(100))
  const repeatedIds = await signUpAll(lost)
  const allIds = [...keptIds, ...lostIds, ...newIds, ...repeatedIds]
  t.equal(new Set(allIds).size, allIds.length, 'no id is given twice')
  const idsNow = await rows()
  for (const [index, body] of lost.entries()) t.equal(idsNow.get(body.mobile), repeatedIds[index])
  for (const [index, body] of kept.entries()) t.equal(idsNow.get(body.mobile), keptIds[index])

  t.equal((await retried(() => whoAmI(cookie))).statusCode, 401, 'the session of the lost user has ended')
})
