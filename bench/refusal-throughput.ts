import { availableParallelism } from 'node:os'
import { closedLoop, requireStatus } from './load.js'
import { type Row, showProgress } from './report.js'
import { issueSignUps, mobileOf, unissuedSignUps } from './request-bodies.js'
import { median, round } from './statistics.js'
import type { Server, SystemUnderTest } from './system-under-test.js'

const rounds = 3
const seconds = 3

/** More than the service can hash in a round: a duplicate that was sent twice would be refused for its used code. */
const duplicateCount = 500 * availableParallelism() * (seconds + 1)

/** Refusals/s, compared with a Fastify route that returns a constant. A duplicate mobile costs a hash by design. */
export async function refusalThroughput(system: SystemUnderTest): Promise<Row[]> {
  const service = await system.startService()
  const constantServer = await system.startYardstick('constant-server.ts')
  const wrongCodes = unissuedSignUps(1_000)
  const invalidBodies = [JSON.stringify({ mobile: '1', sms_code: '123456', password: 'a', password2: 'b' })]
  const constantRates: number[] = []
  const invalidBodyRates: number[] = []
  const wrongCodeRates: number[] = []
  const duplicateRates: number[] = []

  for (let n = 0; n < rounds; n++) {
    showProgress(`refusals: round ${n + 1} of ${rounds}`)
    const duplicates = await registerDuplicates(system)
    constantRates.push(await measureRate(constantServer, 200, wrongCodes))
    invalidBodyRates.push(await measureRate(service, 400, invalidBodies))
    wrongCodeRates.push(await measureRate(service, 422, wrongCodes))
    duplicateRates.push(await measureRate(service, 409, duplicates))
  }

  const rowOf = (name: string, rates: readonly number[]): Row => ({
    name: `refusals: ${name}, requests/s ÷ a constant's`,
    figure: median(rates) / median(constantRates),
    raw: rates.map(round)
  })
  return [
    rowOf('a constant', constantRates),
    rowOf('invalid body', invalidBodyRates),
    rowOf('wrong code', wrongCodeRates),
    rowOf('duplicate mobile', duplicateRates)
  ]
}

async function measureRate(server: Server, expectedStatus: number, bodies: readonly string[]): Promise<number> {
  const { perSecond, replies } = await closedLoop(server, { seconds, bodies })
  requireStatus(replies, expectedStatus, 'refusals')
  return perSecond
}

/** Issues sign-ups, and adds their mobiles to the users table. */
async function registerDuplicates({ stores: { postgres, redis } }: SystemUnderTest): Promise<string[]> {
  const bodies = await issueSignUps(redis, duplicateCount)
  await postgres.query(`INSERT INTO users (name, mobile, password_hash) SELECT m, m, '' FROM unnest($1::text[]) m`, [
    bodies.map(mobileOf)
  ])
  return bodies
}
