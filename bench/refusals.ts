import { availableParallelism } from 'node:os'
import type { Lab, Subject } from './lab.js'
import { closedLoop, issueSignUps, mobileOf } from './load.js'
import { wrongCode } from './priority.js'
import { progress, type Row } from './report.js'
import { median, round } from './statistics.js'

/** Refusals a second, against a Fastify route that returns a constant. A duplicate costs a hash, by design. */
export async function refusals(lab: Lab): Promise<Row[]> {
  const [rounds, seconds] = [3, 3]
  // More than the service can hash in a round: each would be registered by a second try.
  const duplicates = 500 * availableParallelism() * (seconds + 1)
  const service = await lab.service()
  const constant = await lab.program('constant-server.ts')
  const wrong = Array.from({ length: 1_000 }, (_, n) => wrongCode(13_000_000 + n))
  const invalid = [JSON.stringify({ mobile: '1', sms_code: '123456', password: 'a', password2: 'b' })]
  const rates: Record<string, number[]> = {}

  async function measure(name: string, subject: Subject, status: number, bodies: readonly string[]) {
    const { perSecond, replies } = await closedLoop(subject, { connections: 32, seconds, bodies })
    const unexpected = replies.find((reply) => reply.status !== status)
    if (unexpected) throw new Error(`${name} was answered ${unexpected.status}`)
    rates[name] ??= []
    rates[name].push(perSecond)
  }

  for (let n = 0; n < rounds; n++) {
    progress(`refusals: round ${n + 1} of ${rounds}`)
    const registered = await issueSignUps(lab.redis, duplicates)
    await lab.postgres.query(
      `INSERT INTO users (name, mobile, password_hash) SELECT m, m, '' FROM unnest($1::text[]) m`,
      [registered.map(mobileOf)]
    )
    await measure('a constant', constant, 200, wrong)
    await measure('invalid body', service, 400, invalid)
    await measure('wrong code', service, 422, wrong)
    await measure('duplicate mobile', service, 409, registered)
  }
  await Promise.all([service.stop(), constant.stop()])
  const reference = median(rates['a constant'] ?? [])
  return Object.entries(rates).map(([name, values]) => ({
    name: `refusals: ${name}, requests/s ÷ a constant's`,
    figure: median(values) / reference,
    raw: values.map(round)
  }))
}
