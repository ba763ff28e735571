import { hash } from '@node-rs/argon2'
import { client, type Reply } from '../testkit/client.js'
import { noSmsLimits } from '../testkit/sms-webhook.js'
import { alternate } from './alternate.js'
import { closedLoop, requireStatus } from './load.js'
import { type Row, ratioRow, showProgress } from './report.js'
import { newMobiles, password } from './request-bodies.js'
import { median, round } from './statistics.js'
import type { SystemUnderTest } from './system-under-test.js'
import { bareHashes } from './yardsticks/bare-hashes.js'

const rounds = 5
const seconds = 3
const userCount = 4_000

/** How often a registered and an unregistered mobile are compared. */
const comparisons = 200

/** One client asks for the codes of many mobiles, and logs them in. */
const noLimits = { ...noSmsLimits, LOGIN_IP_HOURLY_MAX: '0' }

/** Logins compared with bare hashes, and whether reply times show which mobiles are registered. */
export async function login(system: SystemUnderTest): Promise<Row[]> {
  const service = await system.startService(noLimits)
  const registered = newMobiles(userCount)
  await system.stores.postgres.query(
    'INSERT INTO users (name, mobile, password_hash) SELECT m, m, $2 FROM unnest($1::text[]) m',
    [registered, await hash(password)]
  )
  const bodies = registered.map((mobile) => JSON.stringify({ mobile, password }))
  const path = '/api/v1.0/sessions'

  async function measureLoginRate(): Promise<number> {
    const { perSecond, replies } = await closedLoop(service, { seconds, bodies, path })
    requireStatus(replies, 201, 'logins')
    return perSecond
  }

  // Warm-up, as `warmUp` does with sign-ups.
  await closedLoop(service, { seconds: 2, bodies, path })
  const rates = await alternate(
    rounds,
    measureLoginRate,
    async () => (await bareHashes({ seconds })).perSecond,
    'login'
  )

  const unregistered = newMobiles(comparisons)
  const { sendCode, logIn } = client(service.url)

  /** Returns the median times of a request for registered and for unregistered mobiles, in milliseconds. */
  async function compareTimes(expectedStatus: number, send: (mobile: string) => Promise<Reply>): Promise<number[]> {
    const measure = async (mobile = '') => {
      const startedAt = performance.now()
      const { statusCode } = await send(mobile)
      const ms = performance.now() - startedAt
      requireStatus([{ status: statusCode, ms }], expectedStatus, 'requests')
      return ms
    }
    const times = await alternate(
      comparisons,
      (n) => measure(registered[n]),
      (n) => measure(unregistered[n])
    )
    return [median(times.map(([ms]) => ms)), median(times.map(([, ms]) => ms))]
  }

  showProgress(`login: times of ${comparisons} registered and ${comparisons} unregistered mobiles`)
  const codeTimes = await compareTimes(202, (mobile) => sendCode(mobile))
  const loginTimes = await compareTimes(401, (mobile) => logIn({ mobile, password: 'a wrong password' }))
  return [
    ratioRow('logins/s ÷ bare hashes/s, 32 connections', rates, { atLeast: 0.9 }),
    timingRow('a code sent: the slower median of registered and not ÷ the other', codeTimes),
    timingRow('a login refused: the slower median of registered and not ÷ the other', loginTimes)
  ]
}

function timingRow(name: string, times: readonly number[]): Row {
  return { name, figure: Math.max(...times) / Math.min(...times), target: { atMost: 1.1 }, raw: times.map(round) }
}
