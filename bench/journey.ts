import { createServer } from 'node:http'
import { availableParallelism } from 'node:os'
import { listenOnLoopback } from '../testkit/listen.js'
import { alternate } from './alternate.js'
import { closedLoop, type LoadRequest, requireStatus, warmUp } from './load.js'
import { type Row, ratioRow } from './report.js'
import { code, issueSignUps, mobileOf, newMobiles, signUpBody } from './request-bodies.js'
import type { Server, SystemUnderTest } from './system-under-test.js'

const seconds = 4
const perRound = 600 * availableParallelism() * seconds

/** All limits count, but none refuses: everybody comes from one address. */
const wideLimits = { SMS_IP_HOURLY_MAX: '1000000', SMS_PREFIX_HOURLY_MAX: '1000000', SMS_HOURLY_MAX: '1000000' }

/**
 * What costs more or less than a sign-up alone: the journey that people take (a code is asked for and sent to the webhook, a sign-up has
 * its ticket), a sign-up with its event, a login by code.
 */
export async function journey(system: SystemUnderTest): Promise<Row[]> {
  const { redis, postgres } = system.stores
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

  async function measure(
    load: { requests: LoadRequest[] } | { bodies: string[] },
    server: Server = service
  ): Promise<number> {
    const { replies, perSecond } = await closedLoop(server, { seconds, ...load })
    const counted = replies.filter(({ status }) => status !== 202)
    requireStatus(counted, 201, 'sign-ups or logins')
    return (perSecond * counted.length) / replies.length
  }
  const measureAlone = async (server?: Server) => measure({ bodies: await issueSignUps(redis, perRound) }, server)
  const journeys = await alternate(
    'journey',
    3,
    () => measure({ requests: journeyRequests() }),
    () => measureAlone()
  )

  const EVENTS_WEBHOOK_URL = await listenOnLoopback(createServer((_, response) => response.end()).unref())
  /** Measures a new process, because its memory layout makes a process up to a tenth faster or slower for its whole life. */
  async function measureNew(env: Record<string, string>) {
    const server = await system.startService(env)
    await warmUp(server, redis, 10)
    const perSecond = await measureAlone(server)
    await server.process.stop()
    return perSecond
  }
  const events = await alternate(
    'events',
    7,
    () => measureNew({ EVENTS_WEBHOOK_URL }),
    () => measureNew({})
  )

  const logins = await alternate(
    'login by code',
    2,
    async () => {
      const bodies = await issueSignUps(redis, 4 * perRound)
      const mobiles = bodies.map(mobileOf)
      const insert =
        "INSERT INTO users (name, mobile, password_hash) SELECT mobile, mobile, '!' FROM unnest($1::text[]) AS mobile"
      await postgres.query(insert, [mobiles])
      let sent = 0
      const body = () => JSON.stringify({ mobile: mobiles[sent++], sms_code: code })
      return measure({ requests: [{ path: '/api/v1.0/sessions', body }] })
    },
    () => measureAlone()
  )
  webhook.close()
  return [
    ratioRow('whole journeys/s ÷ sign-ups/s alone', journeys),
    ratioRow('sign-ups/s with events ÷ without', events),
    ratioRow('logins by code/s ÷ sign-ups/s alone', logins)
  ]
}
