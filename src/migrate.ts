import { loadDatabaseUrl } from './config/config.js'
import { migrate } from './stores/migrations.js'

try {
  const applied = await migrate(loadDatabaseUrl(process.env))
  process.stdout.write(`applied: ${applied.join(', ') || 'nothing was pending'}\n`)
} catch (error) {
  process.stderr.write(`migrate: ${error instanceof Error ? error.message : error}\n`)
  process.exitCode = 1
}
