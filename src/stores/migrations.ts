import { fileURLToPath } from 'node:url'
import { runner } from 'node-pg-migrate'

/**
 * Applies the pending migrations of `sql/`, each in a transaction of its own. With an advisory lock, instances that
 * start together take turns.
 *
 * @returns the names of the migrations that this call has applied
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
