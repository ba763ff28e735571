import { databaseUrlOf } from './config/config.js'
import { migrate } from './stores/migrations.js'

try {
  const applied = await migrate(databaseUrlOf(process.env))
  process.stdout.write(`applied: ${applied.join(', ') || 'nothing, all migrations were there'}\n`)
} catch (error) {
  process.stderr.write(`migrate: ${error instanceof Error ? error.message : error}\n`)
  process.exitCode = 1
}
