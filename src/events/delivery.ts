import { setTimeout as sleep } from 'node:timers/promises'
import type { FastifyInstance } from 'fastify'
import type { Config } from '../config/config.js'
import { postWebhook } from '../http/webhook.js'
import type { Postgres, Statement } from '../stores/postgres.js'
import type { EventBacklog } from '../telemetry/observer.js'
import { sampledWarnings } from '../telemetry/sampled-warnings.js'

/** The pause before the next look for events, if there were none. */
const pauseMs = 1_000

/** How many events an instance delivers at a time. */
const batchSize = 50

/**
 * An instance remembers the events of its own sign-ups, and delivers them without the UPDATE that takes them from the outbox: it costs
 * Postgres more than the INSERT. In the outbox they are due after 8 s. For example, an instance signs a person up and dies: another one
 * takes the event 8 s later. The first one begins its attempt within 2 s and ends it within 5 s (http/webhook.ts), so no two overlap.
 */
export const ownEventDueSeconds = 8
const ownEventMaxAgeMs = 2_000

/** An event as the outbox has it. */
export interface UserEvent {
  id: string
  number: string
  type: string
  timestamp: Date
  user_id: string
  mobile: string
  name: string
}

/**
 * Takes the events that are due. The same UPDATE schedules the next attempt: after 6, 12, 24 s and so on, and at last each hour. So if
 * an instance dies, another one repeats its attempts. The first pause is longer than the timeout of http/webhook.ts, so that two
 * attempts do not overlap. The attempt after three days is the last one: then the event is kept.
 *
 * Only the oldest event of a user is taken, until it is delivered or kept, so a receiver hears of a user in order.
 *
 * No statement here is prepared: a plan that was made for an empty outbox takes seconds for the backlog after an outage of the receiver.
 */
const takeEvents: Statement = {
  // A subquery in WHERE could run more than once, and so exceed its LIMIT.
  text: `WITH due AS MATERIALIZED (
           SELECT user_id, number FROM user_events AS event
           WHERE due_at <= now() AND NOT EXISTS (
             SELECT FROM user_events AS older
             WHERE older.user_id = event.user_id AND older.number < event.number AND older.due_at < 'infinity')
           ORDER BY due_at LIMIT $1 FOR UPDATE SKIP LOCKED)
         UPDATE user_events AS event SET attempts = attempts + 1, due_at = CASE
           WHEN created_at < now() - interval '3 days' THEN 'infinity'
           ELSE now() + LEAST(interval '1 hour', interval '6 s' * 2 ^ LEAST(attempts, 10)) END
         FROM due WHERE event.user_id = due.user_id AND event.number = due.number
         RETURNING id, event.number, type, created_at AS timestamp, event.user_id, mobile, name`
}

const deleteEvents: Statement = {
  text: `DELETE FROM user_events AS event USING unnest($1::bigint[], $2::bigint[]) AS delivered (user_id, number)
         WHERE event.user_id = delivered.user_id AND event.number = delivered.number`
}

const readBacklog: Statement = {
  text: `SELECT count(*) FILTER (WHERE due_at < 'infinity')::float AS waiting,
                count(*) FILTER (WHERE due_at = 'infinity')::float AS undeliverable,
                COALESCE(extract(epoch FROM now() - min(created_at) FILTER (WHERE due_at < 'infinity')), 0)::float AS "oldestSeconds"
         FROM user_events`
}

export type Events = ReturnType<typeof startDelivery>

/** Delivers events of users to `EVENTS_WEBHOOK_URL` at least once, until the application closes. All instances share the work. */
export function startDelivery(
  fastify: FastifyInstance,
  url: string,
  { eventsWebhookSecret }: Config,
  postgres: Postgres
) {
  const warn = sampledWarnings(fastify.log)
  const closing = new AbortController()
  let isFailing = false
  let ownEvents: { event: UserEvent; sentAt: number }[] = []

  const post = ({ id, number: _, type, timestamp, ...data }: UserEvent) =>
    postWebhook(url, eventsWebhookSecret, id, { type, timestamp, data })

  /** @returns whether there may be more events that can be delivered now */
  async function deliverBatch(): Promise<boolean> {
    // A receiver that fails is asked with one event at a time, so that its failure costs sign-ups nothing.
    const limit = isFailing ? 1 : batchSize
    const room = isFailing ? limit : limit - ownEvents.length
    const due = room > 0 ? (await postgres.query<UserEvent>(takeEvents, [room])).rows : []
    const oldest = performance.now() - ownEventMaxAgeMs
    ownEvents = ownEvents.filter(({ sentAt }) => sentAt > oldest)
    const own = isFailing ? [] : ownEvents.splice(0, limit - due.length)
    const events = [...due, ...own.map(({ event }) => event)]
    if (events.length === 0) return false
    const results = await Promise.all(events.map(post))
    const failure = results.find(({ isAccepted }) => !isAccepted)
    if (failure) warn(new Error(`the receiver ${failure.summary}`), 'an event could not be delivered')
    const delivered = events.filter((_, index) => results[index]?.isAccepted)
    if (delivered.length > 0) {
      await postgres.query(deleteEvents, [
        delivered.map(({ user_id }) => user_id),
        delivered.map(({ number }) => number)
      ])
      if (isFailing) fastify.log.info('events are delivered again')
    }
    isFailing = delivered.length === 0
    return !isFailing && events.length === limit
  }

  async function deliverUntilClosed(): Promise<void> {
    while (!closing.signal.aborted) {
      const hasMore = await deliverBatch().catch((err) => {
        warn(err, 'the outbox of events failed')
        isFailing = true
        return false
      })
      if (!hasMore) await sleep(pauseMs, undefined, { signal: closing.signal }).catch(() => undefined)
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
  const unknownBacklog = { waiting: Number.NaN, oldestSeconds: Number.NaN, undeliverable: Number.NaN }
  return {
    /** Remembers the event of a sign-up. @param sentAt the time by `performance.now()` before its statement was sent */
    addOwn(event: UserEvent, sentAt: number): void {
      if (!isFailing) ownEvents.push({ event, sentAt })
    },
    /** Reads what waits. */
    async readBacklog(): Promise<EventBacklog> {
      const { rows } = await postgres.query<EventBacklog>(readBacklog, []).catch(() => ({ rows: [] }))
      return rows[0] ?? unknownBacklog
    }
  }
}
