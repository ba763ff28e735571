import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import pg from 'pg'

/** Runs a statement on a connection of its own. @returns the rows */
export async function queryOnce<Row extends pg.QueryResultRow>(
  databaseUrl: string,
  text: string,
  values: unknown[] = []
): Promise<Row[]> {
  const client = new pg.Client(databaseUrl)
  // A failed query rejects. The event comes without a query.
  client.on('error', () => undefined)
  await client.connect()
  try {
    return (await client.query<Row>(text, values)).rows
  } finally {
    await client.end()
  }
}

/** Returns the process id of the server of a data folder. @throws if the server does not run */
export function postmasterPid(data: string): number {
  return Number(readFileSync(join(data, 'postmaster.pid'), 'utf8').split('\n')[0])
}
