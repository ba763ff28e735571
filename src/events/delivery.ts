import { setTimeout as sleep } from 'node:timers/promises'
import type { FastifyInstance } from 'fastify'
import type { Config } from '../config/config.js'
import { signatureHeaders } from '../http/webhook-signature.js'
import type { NamedStatement, Postgres } from '../stores/postgres.js'
import type { EventBacklog } from '../telemetry/observer.js'

/** The pause before the next look for events, if there were none. */
const pauseMs = 1_000

/** How long the receiver may take to answer. Less than the first pause between two attempts, so that they do not overlap. */
const timeoutMs = 5_000

const batchSize = 20

/** An event as the outbox has it. */
interface UserEvent {
  id: string
  type: string
  timestamp: Date
  user_id: string
  mobile: string
  name: string
}

/**
 * Takes the events that are due. The same UPDATE schedules the next attempt: after 6, 12, 24 s and so on, and at last each hour. So an
 * event whose instance dies needs nothing else. The attempt after three days is the last one: then the event is kept.
 *
 * Only the oldest event of a user is taken, until it is delivered or kept, so a receiver hears of a user in order.
 */
const takeEvents: NamedStatement = {
  name: 'take_events',
  text: `UPDATE user_events SET attempts = attempts + 1, due_at = CASE
           WHEN created_at < now() - interval '3 days' THEN 'infinity'
           ELSE now() + LEAST(interval '1 hour', interval '6 s' * 2 ^ LEAST(attempts, 10)) END
         WHERE id IN (
           SELECT id FROM user_events AS event
           WHERE due_at <= now() AND NOT EXISTS (
             SELECT FROM user_events AS older
             WHERE older.user_id = event.user_id AND older.number < event.number AND older.due_at < 'infinity')
           ORDER BY due_at LIMIT ${batchSize} FOR UPDATE SKIP LOCKED)
         RETURNING id, type, created_at AS timestamp, user_id, mobile, name`
}

const deleteEvent: NamedStatement = { name: 'delete_event', text: 'DELETE FROM user_events WHERE id = $1' }

const readBacklog: NamedStatement = {
  name: 'read_backlog',
  text: `SELECT count(*) FILTER (WHERE due_at < 'infinity')::float AS waiting,
                count(*) FILTER (WHERE due_at = 'infinity')::float AS undeliverable,
                COALESCE(extract(epoch FROM now() - min(created_at) FILTER (WHERE due_at < 'infinity')), 0)::float AS "oldestSeconds"
         FROM user_events`
}

/**
 * Delivers events of users to `EVENTS_WEBHOOK_URL` at least once, until the application closes. All instances share the work.
 *
 * @returns a function that reads what waits
 */
export function startDelivery(
  fastify: FastifyInstance,
  { eventsWebhookUrl, eventsWebhookSecret }: Config,
  postgres: Postgres
): (() => Promise<EventBacklog>) | undefined {
  if (eventsWebhookUrl === undefined) return undefined
  const url = eventsWebhookUrl
  const { log } = fastify
  const closing = new AbortController()
  let isFailing = false

  async function deliver({ id, type, timestamp, ...data }: UserEvent): Promise<void> {
    const body = JSON.stringify({ type, timestamp, data })
    const signature = eventsWebhookSecret === undefined ? undefined : signatureHeaders(eventsWebhookSecret, id, body)
    try {
      const headers = { 'content-type': 'application/json', ...signature }
      const options = {
        method: 'POST',
        headers,
        body,
        redirect: 'manual',
        signal: AbortSignal.timeout(timeoutMs)
      } as const
      const response = await fetch(url, options)
      await response.body?.cancel()
      if (!response.ok) throw new Error(`the receiver answered ${response.status}`)
      await postgres.query(deleteEvent, [id])
      if (isFailing) log.info('events are delivered again')
      isFailing = false
    } catch (err) {
      if (!isFailing) log.warn({ err }, 'an event could not be delivered')
      isFailing = true
    }
  }

  async function deliverUntilClosed(): Promise<void> {
    while (!closing.signal.aborted) {
      // The store has logged an outage, and a bug stays until somebody mends it.
      const { rows } = await postgres.query<UserEvent>(takeEvents, []).catch((err) => {
        if (!isFailing) log.error({ err }, 'events could not be read')
        isFailing = true
        return { rows: [] }
      })
      await Promise.all(rows.map(deliver))
      if (rows.length < batchSize) await sleep(pauseMs, undefined, { signal: closing.signal }).catch(() => undefined)
    }
  }

  let delivery: Promise<void> | undefined
  fastify.addHook('onReady', async () => {
    delivery = deliverUntilClosed()
  })
  fastify.addHook('onClose', async () => {
    closing.abort()
    await delivery
  })
  // While Postgres is away nobody knows.
  const unknown = { waiting: Number.NaN, oldestSeconds: Number.NaN, undeliverable: Number.NaN }
  return async () => {
    const { rows } = await postgres.query<EventBacklog>(readBacklog, []).catch(() => ({ rows: [] }))
    return rows[0] ?? unknown
  }
}
