import { createServer } from 'node:http'
import { availableParallelism } from 'node:os'
import { listenOnLoopback } from '../testkit/listen.js'
import { alternate } from './alternate.js'
import { closedLoop, type LoadRequest, requireStatus, warmUp } from './load.js'
import { type Row, ratioRow } from './report.js'
import { issueSignUps, newMobiles, signUpBody } from './request-bodies.js'
import type { SystemUnderTest } from './system-under-test.js'

const rounds = 5
const seconds = 4
const perRound = 600 * availableParallelism() * seconds

/** All limits count, but none refuses: everybody comes from one address. */
const wideLimits = { SMS_IP_HOURLY_MAX: '1000000', SMS_PREFIX_HOURLY_MAX: '1000000', SMS_HOURLY_MAX: '1000000' }

/** The journey that people take (a code is asked for and sent to the webhook, a sign-up has its ticket) beside the sign-up alone. */
export async function journey(system: SystemUnderTest): Promise<Row[]> {
  const { redis } = system.stores
  /** The code of each mobile, as the webhook has received it. */
  const codes = new Map<string, string>()
  const webhook = createServer(async (request, response) => {
    let body = ''
    for await (const chunk of request) body += chunk
    const { mobile, code } = JSON.parse(body)
    codes.set(mobile, code)
    response.end()
  })
  const webhookUrl = await listenOnLoopback(webhook)
  const service = await system.startService({ ...wideLimits, SMS_WEBHOOK_URL: webhookUrl })
  await warmUp(service, redis)

  async function measureJourneys(): Promise<number> {
    const mobiles = newMobiles(perRound).values()
    const requests: LoadRequest[] = [
      {
        path: '/api/v1.0/sms_codes',
        body(context) {
          context.mobile = mobiles.next().value ?? ''
          return JSON.stringify({ mobile: context.mobile, purpose: 'sign_up' })
        },
        onReply(reply, context) {
          context.ticket = JSON.parse(reply).data.ticket
        }
      },
      {
        path: '/api/v1.0/users',
        body: ({ mobile = '', ticket }) => signUpBody(mobile, { sms_code: codes.get(mobile), ticket })
      }
    ]
    const { replies, seconds: elapsed } = await closedLoop(service, { seconds, requests })
    const signUps = replies.filter(({ status }) => status !== 202)
    requireStatus(signUps, 201, 'sign-ups of journeys')
    return signUps.length / elapsed
  }

  async function measureSignUps(): Promise<number> {
    const { replies, perSecond } = await closedLoop(service, { seconds, bodies: await issueSignUps(redis, perRound) })
    requireStatus(replies, 201, 'sign-ups')
    return perSecond
  }

  const results = await alternate(rounds, measureJourneys, measureSignUps, 'journey')
  webhook.close()
  return [ratioRow('whole journeys/s ÷ sign-ups/s alone', results)]
}
