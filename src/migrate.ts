import { loadDatabaseUrl } from './config/config.js'
import { migrate } from './stores/migrations.js'
import { messagesOf } from './telemetry/error-messages.js'

try {
  const applied = await migrate(loadDatabaseUrl(process.env))
  process.stdout.write(`applied: ${applied.join(', ') || 'nothing was pending'}\n`)
} catch (error) {
  process.stderr.write(`migrate: ${messagesOf(error).join(': ')}\n`)
  process.exitCode = 1
}
