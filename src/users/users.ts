import type { FastifyBaseLogger } from 'fastify'
import { type Events, ownEventDueSeconds } from '../events/delivery.js'
import { verifierOf } from '../passwords/stored-hash.js'
import type { Postgres, Statement } from '../stores/postgres.js'

export interface User {
  /** A 64-bit integer in decimal. */
  id: string
  name: string
  /** A PHC string, or what a former system has left. */
  passwordHash: string
  /** A session has ended if it began with an older epoch. A new user has 0. */
  sessionEpoch: number
}

/** A new row. The other fields are those of its event; without events they are absent. */
interface InsertedUser {
  id: string
  event_id: string
  number: string
  created_at: Date
}

/**
 * Returns a statement that changes a user. With events, it also writes one to the outbox (events/), in the same round trip: the event is
 * there if and only if the change is.
 */
function change(name: string, text: string, columns: string, event: string, hasEvents: boolean): Statement {
  if (!hasEvents) return { name, text: `${text} RETURNING ${columns}` }
  // Only a new user has no earlier event, which must be delivered first.
  const dueSeconds = event === 'user.registered' ? ownEventDueSeconds : 0
  return {
    name,
    text: `WITH changed AS (${text} RETURNING id, name, mobile, session_epoch),
           event AS (INSERT INTO user_events (user_id, type, mobile, name, due_at)
                     SELECT id, '${event}', mobile, name, now() + interval '${dueSeconds} s' FROM changed
                     RETURNING id AS event_id, number, created_at)
           SELECT ${columns}, event_id, number, created_at FROM changed, event`
  }
}

const insertion = 'INSERT INTO users (name, mobile, password_hash) VALUES ($1, $1, $2) ON CONFLICT (mobile) DO NOTHING'
export const insertUser = (hasEvents: boolean) => change('insert_user', insertion, 'id', 'user.registered', hasEvents)

const findUser: Statement = {
  name: 'find_user',
  text: `SELECT id, name, password_hash AS "passwordHash", session_epoch AS "sessionEpoch" FROM users WHERE mobile = $1`
}

/**
 * The seconds since 2024, or the former epoch plus one if that is greater. So it is also greater than an epoch that Postgres
 * has lost in a failover. `now()` and not `clock_timestamp()`, because Citus takes no volatile function in an UPDATE. An
 * integer holds the difference until 2092, the seconds since 1970 only until 2038.
 */
export const nextEpoch = 'GREATEST(session_epoch + 1, floor(extract(epoch FROM now()) - 1704067200)::int)'

const replaceHash: Statement = {
  name: 'replace_hash',
  text: 'UPDATE users SET password_hash = $3 WHERE mobile = $1 AND password_hash = $2'
}

const beginSessionEpoch: Statement = {
  name: 'begin_session_epoch',
  text: `UPDATE users SET session_epoch = ${nextEpoch} WHERE mobile = $1 AND id = $2
         RETURNING session_epoch AS "sessionEpoch"`
}

/** The users table. A hash that matches no password is logged once for a user, and for at most 10,000. */
export function createUsers(postgres: Postgres, log: FastifyBaseLogger, events: Events | undefined) {
  const hasEvents = events !== undefined
  const insert = insertUser(hasEvents)
  const userColumns = 'id, name, session_epoch AS "sessionEpoch"'
  const update = `UPDATE users SET password_hash = $2, session_epoch = ${nextEpoch} WHERE mobile = $1`
  const setPassword = change('set_password', update, userColumns, 'user.password_changed', hasEvents)
  const deletion = 'DELETE FROM users WHERE mobile = $1 AND id = $2 AND session_epoch = $3'
  const deleteUser = change('delete_user', deletion, 'id', 'user.deleted', hasEvents)
  const logged = new Set<string>()
  return {
    /**
     * Adds a user in one statement. The first name of a user is the mobile. If several calls add the same mobile at the same time,
     * exactly one of them adds the row.
     *
     * @param passwordHash a PHC string
     * @returns the id of the new row, or undefined if the mobile is registered
     */
    async insert(mobile: string, passwordHash: string): Promise<string | undefined> {
      const sentAt = performance.now()
      const { rows } = await postgres.query<InsertedUser>(insert, [mobile, passwordHash])
      const [row] = rows
      if (row) {
        const { id: user_id, event_id: id, number, created_at: timestamp } = row
        events?.addOwn({ id, number, type: 'user.registered', timestamp, user_id, mobile, name: mobile }, sentAt)
      }
      return row?.id
    },
    async find(mobile: string): Promise<User | undefined> {
      const { rows } = await postgres.query<User>(findUser, [mobile])
      const [user] = rows
      const matchesNoPassword = user && !logged.has(user.id) && verifierOf(user.passwordHash) === undefined
      if (matchesNoPassword && logged.size < 10_000) {
        logged.add(user.id)
        log.warn({ user_id: user.id }, 'a user has a password hash of an unknown format, which no password matches')
      }
      return user
    },
    /**
     * Replaces the password of a user, and begins a session epoch in the same step. So a request reads either the former
     * password with the former epoch, or the new ones.
     *
     * @returns undefined if the mobile has no user
     */
    async setPassword(mobile: string, passwordHash: string): Promise<Omit<User, 'passwordHash'> | undefined> {
      const { rows } = await postgres.query<Omit<User, 'passwordHash'>>(setPassword, [mobile, passwordHash])
      return rows[0]
    },
    /** Replaces a hash by another one of the same password, unless the hash has been replaced since. */
    async replaceHash(mobile: string, formerHash: string, passwordHash: string): Promise<void> {
      await postgres.query(replaceHash, [mobile, formerHash, passwordHash])
    },
    /** @returns whether the user was deleted: not if its session epoch has changed since it was read */
    async delete(mobile: string, { id, sessionEpoch }: User): Promise<boolean> {
      const { rows } = await postgres.query(deleteUser, [mobile, id, sessionEpoch])
      return rows.length === 1
    },
    /**
     * Begins a session epoch.
     *
     * @returns the epoch, or undefined if the user has been deleted
     */
    async beginSessionEpoch({ mobile, user_id }: { mobile: string; user_id: string }): Promise<number | undefined> {
      const { rows } = await postgres.query<Pick<User, 'sessionEpoch'>>(beginSessionEpoch, [mobile, user_id])
      return rows[0]?.sessionEpoch
    }
  }
}
