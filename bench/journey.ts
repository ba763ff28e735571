import { createServer } from 'node:http'
import { availableParallelism } from 'node:os'
import { listenOnLoopback } from '../testkit/listen.js'
import { alternate } from './alternate.js'
import { closedLoop, type LoadRequest, requireStatus, warmUp } from './load.js'
import { type Row, ratioRow } from './report.js'
import { issueSignUps, newMobiles, signUpBody } from './request-bodies.js'
import type { SystemUnderTest } from './system-under-test.js'

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
  const service = await system.startService({ ...wideLimits, SMS_WEBHOOK_URL: await listenOnLoopback(webhook) })
  await warmUp(service, redis)

  function journeyRequests(): LoadRequest[] {
    const mobiles = newMobiles(perRound).values()
    const askForCode: LoadRequest = {
      path: '/api/v1.0/sms_codes',
      body(context) {
        context.mobile = mobiles.next().value ?? ''
        return JSON.stringify({ mobile: context.mobile, purpose: 'sign_up' })
      },
      onReply(reply, context) {
        context.ticket = JSON.parse(reply).data.ticket
      }
    }
    const body: LoadRequest['body'] = ({ mobile = '', ticket }) =>
      signUpBody(mobile, { sms_code: codes.get(mobile), ticket })
    return [askForCode, { path: '/api/v1.0/users', body }]
  }

  async function measure(load: { requests: LoadRequest[] } | { bodies: string[] }): Promise<number> {
    const { replies, perSecond } = await closedLoop(service, { seconds, ...load })
    const signUps = replies.filter(({ status }) => status !== 202)
    requireStatus(signUps, 201, 'sign-ups')
    return (perSecond * signUps.length) / replies.length
  }

  const rounds = await alternate(
    'journey',
    5,
    () => measure({ requests: journeyRequests() }),
    async () => measure({ bodies: await issueSignUps(redis, perRound) })
  )
  webhook.close()
  return [ratioRow('whole journeys/s ÷ sign-ups/s alone', rounds)]
}
