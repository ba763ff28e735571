import { createServer } from 'node:http'
import { text } from 'node:stream/consumers'
import { Webhook } from 'standardwebhooks'
import { listenOnLoopback } from '../../testkit/listen.js'
import type { Report } from './report.js'
import type { SeededRandom } from './seeded-random.js'

export const eventsSecret = 'whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw'

/** Starts a receiver of events, which verifies each signature. As long as it is faulty, it fails at random. */
export async function startEventReceiver(random: SeededRandom, report: Report) {
  /** The body of each accepted event by its webhook-id, in the order of the first receipts: duplicates may come late. */
  const bodies = new Map<string, string>()
  const webhook = new Webhook(eventsSecret)
  const server = createServer(async (request, response) => {
    const body = await text(request).catch(() => undefined)
    if (body === undefined) return
    const headers = Object.fromEntries(Object.entries(request.headers).map(([name, value]) => [name, `${value}`]))
    const id = `${headers['webhook-id']}`
    try {
      webhook.verify(body, headers)
    } catch {
      report.violate(`an event with a wrong signature: ${id}`)
    }
    const chance = receiver.isFaulty ? random.next() : 1
    if (chance < 0.08) {
      report.count('deliveries that the receiver refused')
      if (chance < 0.04) response.writeHead(500).end()
      else request.socket.resetAndDestroy()
      return
    }
    const former = bodies.get(id)
    report.count(former === undefined ? 'events delivered' : 'events delivered again')
    if (former !== undefined && former !== body) report.violate(`two events with one webhook-id: ${id}`)
    bodies.set(id, body)
    // An accepted event whose answer is lost comes again.
    if (chance < 0.12) request.socket.resetAndDestroy()
    else response.writeHead(204).end()
  })
  const receiver = { url: await listenOnLoopback(server), bodies, isFaulty: true }
  return receiver
}
