import { createReadStream } from 'node:fs'
import { createInterface } from 'node:readline'
import { type Info, parse } from 'csv-parse'
import type pg from 'pg'
import { mobilePattern } from '../http/schemas.js'
import { verifierOf } from '../passwords/stored-hash.js'

/** What one line of a file says of a user. */
interface ImportedUser {
  mobile: string
  password_hash: string
  name: string
  created_at: Date | null
}

export interface ImportOptions {
  /** Nothing is written. */
  isDryRun: boolean
  /** A line that is not imported. It is named by its number, because it may hold a mobile or a hash. */
  onBadLine(number: number, reason: string): void
  onProgress(readBytes: number, counts: ImportCounts): void
}

export interface ImportCounts {
  lines: number
  imported: number
  /** Their mobiles had a user already, or stood on an earlier line. */
  skipped: number
  bad: number
}

/** How many rows one INSERT has: with fewer, the round trips count; more bring nothing. */
const batchSize = 1_000

const insertUsers = {
  name: 'import_users',
  text: `INSERT INTO users (mobile, password_hash, name, created_at)
         SELECT mobile, password_hash, name, COALESCE(created_at, now())
         FROM unnest($1::text[], $2::text[], $3::text[], $4::timestamptz[]) AS line (mobile, password_hash, name, created_at)
         ON CONFLICT (mobile) DO NOTHING`
}

/** The hash of a user who cannot log in with a password, but can reset it. */
const lockedHash = '!'

/**
 * Adds users of another system from a file: CSV with a header, or JSON lines. Each has `mobile` and `password_hash`, and may have `name`
 * and `created_at`. Mobiles that have a user are skipped, so an import can be repeated, and can run beside the service. It writes no
 * events.
 */
export async function importUsers(client: pg.Client, file: string, options: ImportOptions): Promise<ImportCounts> {
  const stream = createReadStream(file)
  const counts: ImportCounts = { lines: 0, imported: 0, skipped: 0, bad: 0 }
  let batch: ImportedUser[] = []
  const mobilesOfDryRun = new Set<string>()

  async function insertBatch(): Promise<void> {
    const column = (name: keyof ImportedUser) => batch.map((user) => user[name])
    const values = [column('mobile'), column('password_hash'), column('name'), column('created_at')]
    const inserted = options.isDryRun
      ? await countNew()
      : ((await client.query({ ...insertUsers, values })).rowCount ?? 0)
    counts.imported += inserted
    counts.skipped += batch.length - inserted
    batch = []
    options.onProgress(stream.bytesRead, counts)
  }
  async function countNew(): Promise<number> {
    const mobiles = [...new Set(batch.map(({ mobile }) => mobile))].filter((mobile) => !mobilesOfDryRun.has(mobile))
    for (const mobile of mobiles) mobilesOfDryRun.add(mobile)
    const { rows } = await client.query('SELECT count(*)::int AS found FROM users WHERE mobile = ANY ($1)', [mobiles])
    return mobiles.length - rows[0].found
  }

  function countBad(number: number, reason: string): void {
    counts.lines++
    counts.bad++
    options.onBadLine(number, reason)
  }
  const isCsv = file.toLowerCase().endsWith('.csv')
  for await (const { number, record } of isCsv ? csvLines(stream, countBad) : jsonLines(stream)) {
    const user = parseUser(record)
    if (typeof user === 'string') countBad(number, user)
    else {
      counts.lines++
      if (batch.push(user) === batchSize) await insertBatch()
    }
  }
  await insertBatch()
  return counts
}

const unparsable = 'it cannot be parsed'

interface Line {
  number: number
  /** Undefined if the line cannot be parsed. */
  record: Record<string, unknown> | undefined
}

async function* csvLines(
  stream: NodeJS.ReadableStream,
  onBadLine: (number: number, reason: string) => void
): AsyncGenerator<Line> {
  const parser = stream.pipe(
    parse({
      bom: true,
      columns: checkHeader,
      info: true,
      skip_empty_lines: true,
      skip_records_with_error: true,
      // Not its message: it may quote the line.
      on_skip: (error) => void onBadLine(Number(error?.lines), unparsable)
    })
  )
  stream.on('error', (error) => parser.destroy(error))
  const records: AsyncIterable<{ record: Record<string, unknown>; info: Info }> = parser
  for await (const { record, info } of records) yield { number: info.lines, record }
}

function checkHeader(header: string[]): string[] {
  const missing = ['mobile', 'password_hash'].filter((name) => !header.includes(name))
  if (missing.length > 0) throw new Error(`the header has no ${missing.join(' and no ')}`)
  return header
}

async function* jsonLines(input: NodeJS.ReadableStream): AsyncGenerator<Line> {
  let number = 0
  for await (const text of createInterface({ input })) {
    number++
    if (text.trim() !== '') yield { number, record: parseObject(text) }
  }
}

function parseObject(text: string): Record<string, unknown> | undefined {
  try {
    const value: unknown = JSON.parse(text)
    return typeof value === 'object' && value !== null ? { ...value } : undefined
  } catch {
    return undefined
  }
}

/** Returns the user of a line, or what is wrong with it. */
function parseUser(record: Line['record']): ImportedUser | string {
  if (record === undefined) return unparsable
  const { mobile, password_hash, name, created_at } = record
  if (typeof mobile !== 'string' || !mobilePattern.test(mobile)) return 'the mobile is bad'
  if (typeof password_hash !== 'string' || password_hash === '') return 'the hash is empty'
  if (password_hash !== lockedHash && verifierOf(password_hash) === undefined) return 'the hash is of an unknown format'
  if (name && (typeof name !== 'string' || name.includes('\0'))) return 'the name is bad'
  const createdAt = created_at ? new Date(`${created_at}`) : null
  if (Number.isNaN(createdAt?.getTime())) return 'created_at is no time'
  return { mobile, password_hash, name: name ? `${name}` : mobile, created_at: createdAt }
}
