import { alternate } from './alternate.js'
import { cheapestHash, measureSignUpRate } from './cheapest-hash.js'
import { type Row, ratioRow, showProgress } from './report.js'
import type { SystemUnderTest } from './system-under-test.js'

const rounds = 6

/** P6: what everything but the hash costs, compared with a program without a framework that hashes nothing. */
export async function frameworkOverhead(system: SystemUnderTest): Promise<Row[]> {
  const service = await system.startService(cheapestHash)
  const bareServer = await system.startYardstick('bare-server.ts')
  showProgress('overhead: warm-up')
  for (const server of [service, bareServer]) await measureSignUpRate(system, server)
  const rates = await alternate(
    rounds,
    () => measureSignUpRate(system, service),
    () => measureSignUpRate(system, bareServer),
    'overhead'
  )
  return [ratioRow('P6: sign-ups/s with the cheapest hash ÷ a bare program without one', rates, { atLeast: 0.75 })]
}
