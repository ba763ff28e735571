import { freePort } from '../src/dev/stores.js'
import { alternate } from './alternate.js'
import type { Lab } from './lab.js'
import { issueSignUps, openLoop } from './load.js'
import { cheapestHash, signUpsPerSecond } from './overhead.js'
import type { Row } from './report.js'
import { median, round } from './statistics.js'

/** What the metrics cost where hashes cost nothing, and whether they agree with what the load has counted. */
export async function metrics(lab: Lab): Promise<Row[]> {
  const [rounds, seconds] = [12, 3]
  const port = await freePort()
  const measured = await lab.service({ ...cheapestHash, METRICS_PORT: `${port}` })
  const plain = await lab.service(cheapestHash)
  const scrape = async () => (await fetch(`http://127.0.0.1:${port}/metrics`)).text()

  const pairs = await alternate(
    'metrics',
    rounds,
    async () => {
      const scraping = setInterval(scrape, 1_000)
      const perSecond = await signUpsPerSecond(lab, measured, seconds)
      clearInterval(scraping)
      return perSecond
    },
    () => signUpsPerSecond(lab, plain, seconds)
  )

  const registered = async () =>
    Number(/^mobile_signup_request_duration_seconds_count\{.*outcome="registered"\} (\d+)/m.exec(await scrape())?.[1])
  const before = await registered()
  const bodies = await issueSignUps(lab.redis, 2_000)
  const replies = await openLoop(measured, { perSecond: 500, seconds: 4, bodies })
  const [told, counted] = [replies.filter(({ status }) => status === 201).length, (await registered()) - before]
  if (told !== counted) throw new Error(`the load was told of ${told} sign-ups, the metrics count ${counted}`)

  await Promise.all([measured.stop(), plain.stop()])
  return [
    {
      name: 'sign-ups/s with the cheapest hash, with metrics ÷ without',
      figure: median(pairs.map(([ours, theirs]) => ours / theirs)),
      target: { atLeast: 0.97 },
      raw: pairs.map((pair) => pair.map(round))
    },
    {
      name: 'sign-ups in the metrics ÷ as the load was told of them',
      figure: counted / told,
      target: { atLeast: 1 },
      raw: [counted, told]
    }
  ]
}
