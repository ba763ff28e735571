import { databaseUrlOf } from './config.js'
import { migrate } from './migrations.js'

try {
  const applied = await migrate(databaseUrlOf(process.env))
  process.stdout.write(`applied: ${applied.join(', ') || 'nothing, all migrations were there'}\n`)
} catch (error) {
  process.stderr.write(`migrate: ${error instanceof Error ? error.message : error}\n`)
  process.exitCode = 1
}
