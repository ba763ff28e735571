import { setTimeout as sleep } from 'node:timers/promises'
import { verify } from '@node-rs/argon2'
import type { ReplicatedPostgres } from '../../testkit/replicated-postgres.js'
import { about, type Person } from './people.js'
import type { Report } from './report.js'

interface Row {
  id: string
  mobile: string
  password_hash: string
}

const readRows = (postgres: ReplicatedPostgres) => postgres.query<Row>('SELECT id, mobile, password_hash FROM users')

/** Returns those whose sign-up was answered, and whose row Postgres has lost. */
export async function findLost(postgres: ReplicatedPostgres, people: readonly Person[]): Promise<Person[]> {
  const mobiles = new Set((await readRows(postgres)).map(({ mobile }) => mobile))
  return people.filter(({ mobile, isDeleted }) => !isDeleted && !mobiles.has(mobile))
}

/** Compares the answers that people got with the rows. */
export async function auditRows(
  postgres: ReplicatedPostgres,
  people: readonly Person[],
  report: Report,
  mayLoseRows: boolean
): Promise<void> {
  const rows = await readRows(postgres)
  const rowOf = new Map(rows.map((row) => [row.mobile, row]))
  if (rowOf.size < rows.length) report.violate('several rows of one mobile')
  const ownerOf = new Map<string, Person>()
  for (const person of people) {
    for (const id of person.userIds) {
      if (ownerOf.has(id)) report.violate(about(person, 'the id of another person'))
      ownerOf.set(id, person)
    }
    const row = rowOf.get(person.mobile)
    rowOf.delete(person.mobile)
    if (row === undefined) {
      if (person.isDeleted) report.count('clients whose row is deleted')
      else report.violate(about(person, 'no row'))
      continue
    }
    if (person.isDeleted && !mayLoseRows) report.violate(about(person, 'the row is not deleted'))
    const passwords = mayLoseRows ? person.passwords : person.passwords.slice(-1)
    const verified = await Promise.all(passwords.map((password) => verify(row.password_hash, password)))
    if (row.id !== person.userIds.at(-1)) report.violate(about(person, 'the row has another id'))
    else if (!verified.includes(true)) report.violate(about(person, 'the row has another password'))
    else report.count('clients whose row has the id of their last answer, and their password')
  }
  for (const mobile of rowOf.keys()) report.violate(`a row without a client: ${mobile.slice(-6)}`)
}

/** How long the last deliveries may need. */
const drainMs = 60_000

/** Lets the service deliver what waits, without the pauses between attempts, which grow. */
export async function drainEvents(postgres: ReplicatedPostgres, report: Report): Promise<void> {
  for (const deadline = Date.now() + drainMs; Date.now() < deadline; await sleep(1_000)) {
    const events = await postgres.query(`UPDATE user_events SET due_at = now() WHERE due_at < 'infinity' RETURNING id`)
    if (events.length === 0) return
  }
  report.violate('events were not delivered in time')
}

/**
 * Compares the accepted events with the rows and the answers: each user has its events, once but for duplicates, and in order.
 *
 * @param bodies by webhook-id, in the order of their first receipts
 */
export async function auditEvents(
  postgres: ReplicatedPostgres,
  people: readonly Person[],
  bodies: ReadonlyMap<string, string>,
  report: Report,
  mayLoseRows: boolean
): Promise<void> {
  const typesOf = new Map<string, string>()
  for (const body of bodies.values()) {
    const { type, data } = JSON.parse(body)
    const user = `${data.user_id} ${data.mobile}`
    typesOf.set(user, `${typesOf.get(user) ?? ''} ${type}`)
  }
  const rows = new Set((await readRows(postgres)).map(({ id }) => id))
  const mobiles = new Set(people.map(({ mobile }) => mobile))
  for (const person of people) {
    const changes = person.passwords.length > 1 ? '( user.password_changed)+' : ''
    const all = new RegExp(`^ user.registered${changes}${person.isDeleted ? ' user.deleted' : ''}$`)
    for (const id of person.userIds) {
      const user = `${id} ${person.mobile}`
      const types = typesOf.get(user) ?? ''
      // A lost row takes its events with it, unless they were delivered before.
      const isLost = mayLoseRows && !rows.has(id) && types === ''
      const expected = mayLoseRows ? /^ user.registered( user.password_changed)*( user.deleted)*$/ : all
      if (expected.test(types)) report.count('users whose events are complete and in order')
      else if (!isLost) report.violate(about(person, `the events are${types}`))
      typesOf.delete(user)
    }
  }
  for (const [user, types] of typesOf) {
    if (mayLoseRows && mobiles.has(user.split(' ')[1] ?? '')) report.count('users whose events are those of a lost row')
    else report.violate(`events of a user who never existed: ${user.slice(-6)}${types}`)
  }
}
