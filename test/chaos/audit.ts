import { verify } from '@node-rs/argon2'
import type { Pool } from 'pg'
import { about, type Person } from './people.js'
import type { Report } from './report.js'

/** Compares the answers that people got with the rows. */
export async function auditRows(postgres: Pool, people: readonly Person[], report: Report): Promise<void> {
  const { rows } = await postgres.query<{ id: string; mobile: string; password_hash: string }>('SELECT * FROM users')
  const rowOf = new Map(rows.map((row) => [row.mobile, row]))
  if (rowOf.size < rows.length) report.violate('several rows of one mobile')
  for (const person of people) {
    const row = rowOf.get(person.mobile)
    rowOf.delete(person.mobile)
    if (row === undefined) report.violate(about(person, 'no row'))
    else if (row.id !== person.userId) report.violate(about(person, 'the row has another id'))
    else if (!(await verify(row.password_hash, person.password))) {
      report.violate(about(person, 'the row has another password'))
    } else report.count('clients whose row has the id of their answer, and their password')
  }
  for (const mobile of rowOf.keys()) report.violate(`a row without a client: ${mobile.slice(-6)}`)
}
