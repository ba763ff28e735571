import { statSync } from 'node:fs'
import { parseArgs } from 'node:util'
import pg from 'pg'
import { loadDatabaseUrl } from './config/config.js'
import { messagesOf } from './telemetry/error-messages.js'
import { type ImportCounts, importUsers } from './users/import-users.js'

/** Between two reports of the progress. */
const [barIntervalMs, lineIntervalMs] = [100, 5_000]

const { stderr } = process

try {
  const { positionals, values } = parseArgs({ allowPositionals: true, options: { 'dry-run': { type: 'boolean' } } })
  const [, file = ''] = positionals
  const bytes = statSync(file).size
  const client = new pg.Client(loadDatabaseUrl(process.env))
  client.on('error', () => undefined)
  await client.connect()
  const isDryRun = values['dry-run'] ?? false
  let reportedAt = performance.now()
  const counts = await importUsers(client, file, {
    isDryRun,
    onBadLine: (number, reason) => stderr.write(`${stderr.isTTY ? '\r\x1b[K' : ''}line ${number}: ${reason}\n`),
    onProgress(readBytes, { lines }) {
      const now = performance.now()
      if (now - reportedAt < (stderr.isTTY ? barIntervalMs : lineIntervalMs)) return
      reportedAt = now
      stderr.write(progressOf(readBytes / bytes, lines))
    }
  }).finally(() => client.end())
  if (stderr.isTTY) stderr.write(`${progressOf(1, counts.lines)}\n`)
  process.stdout.write(`${summaryOf(counts, isDryRun)}\n`)
  if (counts.bad > 0) process.exitCode = 1
} catch (error) {
  stderr.write(`import: ${messagesOf(error).join(': ')}\n`)
  process.exitCode = 1
}

/** Returns a bar for a terminal, or a line. */
function progressOf(share: number, lines: number): string {
  const text = `${Math.floor(100 * share)} %, ${lines} lines`
  if (!stderr.isTTY) return `${text}\n`
  const filled = Math.floor(30 * share)
  return `\r[${'#'.repeat(filled)}${' '.repeat(30 - filled)}] ${text}`
}

function summaryOf({ lines, imported, skipped, bad }: ImportCounts, isDryRun: boolean): string {
  return `${lines} lines: ${imported} ${isDryRun ? 'to import' : 'imported'}, ${skipped} skipped (the mobile has a user), ${bad} bad`
}
