import { fileURLToPath } from 'node:url'
import { runner } from 'node-pg-migrate'

/**
 * Applies the pending migrations of `sql/`, each in a transaction of its own. Instances that start at once take turns:
 * an advisory lock lets one through and the others find nothing left to do.
 *
 * @returns the names of the migrations applied now
 */
export async function migrate(databaseUrl: string): Promise<string[]> {
  const applied = await runner({
    databaseUrl,
    dir: fileURLToPath(new URL('../../sql', import.meta.url)),
    direction: 'up',
    migrationsTable: 'pgmigrations',
    advisoryLockMode: 'wait',
    log: () => undefined
  })
  return applied.map(({ name }) => name)
}
