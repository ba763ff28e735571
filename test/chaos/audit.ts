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
  return people.filter(({ mobile }) => !mobiles.has(mobile))
}

/** Compares the answers that people got with the rows. */
export async function auditRows(
  postgres: ReplicatedPostgres,
  people: readonly Person[],
  report: Report
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
    if (row === undefined) report.violate(about(person, 'no row'))
    else if (row.id !== person.userIds.at(-1)) report.violate(about(person, 'the row has another id'))
    else if (!(await verify(row.password_hash, person.password))) {
      report.violate(about(person, 'the row has another password'))
    } else report.count('clients whose row has the id of their last answer, and their password')
  }
  for (const mobile of rowOf.keys()) report.violate(`a row without a client: ${mobile.slice(-6)}`)
}
