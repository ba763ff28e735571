import { alternate } from './alternate.js'
import { cheapestHash, measureSignUpRate } from './cheapest-hash.js'
import { openLoop } from './load.js'
import { type Row, ratioRow, showProgress } from './report.js'
import { issueSignUps } from './request-bodies.js'
import type { SystemUnderTest } from './system-under-test.js'

const rounds = 12

/** More often than Prometheus usually scrapes, so that the cost is not underestimated. */
const scrapeIntervalMs = 1_000

/** The cost of metrics where hashes cost almost nothing, and whether the metrics count what the load counts. */
export async function metricsCost(system: SystemUnderTest): Promise<Row[]> {
  const withMetrics = await system.startService({ ...cheapestHash, METRICS_PORT: '0' })
  const withoutMetrics = await system.startService(cheapestHash)
  const [, metricsUrl = ''] = await withMetrics.process.waitFor(/Metrics at (http:[^"]+)/)
  const scrape = async () => (await fetch(metricsUrl)).text()

  async function measureWithScrapes(): Promise<number> {
    const interval = setInterval(scrape, scrapeIntervalMs)
    try {
      return await measureSignUpRate(system, withMetrics)
    } finally {
      clearInterval(interval)
    }
  }

  async function registeredCount(): Promise<number> {
    const count = /^mobile_signup_request_duration_seconds_count\{.*outcome="registered"\} (\d+)/m
    return Number(count.exec(await scrape())?.[1])
  }

  async function compareCounts(): Promise<[inMetrics: number, replies: number]> {
    const before = await registeredCount()
    const bodies = await issueSignUps(system.stores.redis, 2_000)
    const replies = await openLoop(withMetrics, { perSecond: 500, seconds: 4, bodies })
    const inMetrics = (await registeredCount()) - before
    const created = replies.filter(({ status }) => status === 201).length
    if (inMetrics !== created) throw new Error(`the metrics count ${inMetrics} sign-ups, the load ${created}`)
    return [inMetrics, created]
  }

  showProgress('metrics: warm-up')
  for (const server of [withMetrics, withoutMetrics]) await measureSignUpRate(system, server)
  const rates = await alternate(rounds, measureWithScrapes, () => measureSignUpRate(system, withoutMetrics), 'metrics')
  const [inMetrics, created] = await compareCounts()
  return [
    ratioRow('sign-ups/s with the cheapest hash, with metrics ÷ without', rates, { atLeast: 0.97 }),
    {
      name: 'sign-ups in the metrics ÷ as the load was told of them',
      figure: inMetrics / created,
      target: { atLeast: 1 },
      raw: [inMetrics, created]
    }
  ]
}
