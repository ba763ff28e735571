import { statSync } from 'node:fs'
import { parseArgs } from 'node:util'
import pg from 'pg'
import { loadDatabaseUrl } from './config/config.js'
import { messagesOf } from './telemetry/error-messages.js'
import { importUsers } from './users/import-users.js'

/** Between two reports of the progress. */
const [barIntervalMs, lineIntervalMs] = [100, 5_000]

const { stderr, stdout } = process
const counts = { imported: 0, skipped: 0, bad: 0 }
const readLines = () => counts.imported + counts.skipped + counts.bad

try {
  const { positionals, values } = parseArgs({ allowPositionals: true, options: { 'dry-run': { type: 'boolean' } } })
  const [, file, ...others] = positionals
  if (!file || others.length > 0) throw new Error('expects one FILE')
  const bytes = statSync(file).size
  const client = new pg.Client(loadDatabaseUrl(process.env))
  client.on('error', () => undefined)
  await client.connect()
  const isDryRun = values['dry-run'] ?? false
  let reportedAt = performance.now()
  try {
    await importUsers(client, file, counts, {
      isDryRun,
      onBadLine: (number, reason) => report(`line ${number}: ${reason}`),
      onProgress(readBytes) {
        const now = performance.now()
        if (now - reportedAt < (stderr.isTTY ? barIntervalMs : lineIntervalMs)) return
        reportedAt = now
        // A pipe has no size, and a file may grow.
        reportProgress(Math.min(readBytes / Math.max(bytes, 1), 1))
      }
    })
    if (stderr.isTTY) reportProgress(1)
  } finally {
    if (stderr.isTTY) stderr.write('\n')
    const done = isDryRun ? 'to import' : 'imported'
    stdout.write(
      `${readLines()} lines: ${counts.imported} ${done}, ${counts.skipped} skipped (the mobile has a user), ${counts.bad} bad\n`
    )
    await client.end()
  }
  if (counts.bad > 0) process.exitCode = 1
} catch (error) {
  report(`import: ${messagesOf(error).join(': ')}`)
  process.exitCode = 1
}

/** Writes a line, on a terminal in place of the bar. */
function report(line: string): void {
  stderr.write(`${stderr.isTTY ? '\r\x1b[K' : ''}${line}\n`)
}

/** Draws a bar on a terminal, and writes a line elsewhere. */
function reportProgress(share: number): void {
  const filled = Math.floor(30 * share)
  const bar = `\r[${'#'.repeat(filled)}${' '.repeat(30 - filled)}] `
  const text = `${Math.floor(100 * share)} %, ${readLines()} lines`
  stderr.write(stderr.isTTY ? bar + text : `${text}\n`)
}
