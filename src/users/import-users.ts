import { createReadStream } from 'node:fs'
import { type Info, parse } from 'csv-parse'
import pg from 'pg'
import { mobilePattern } from '../http/schemas.js'
import { verifierOf } from '../passwords/stored-hash.js'

/** What one line of a file says of a user. */
interface ImportedUser {
  number: number
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
  /** Called after each batch. */
  onProgress(readBytes: number): void
}

export interface ImportCounts {
  imported: number
  /** Their mobiles had a user already, or stood on an earlier line. */
  skipped: number
  bad: number
}

/** How many rows one INSERT has: with fewer, the round trips count; more bring nothing. */
const batchSize = 1_000

const insertUsers = `
  INSERT INTO users (mobile, password_hash, name, created_at)
  SELECT mobile, password_hash, name, COALESCE(created_at, now())
  FROM unnest($1::text[], $2::text[], $3::text[], $4::timestamptz[]) AS line (mobile, password_hash, name, created_at)
  ON CONFLICT (mobile) DO NOTHING`

/** The hash of a user who cannot log in with a password, but can reset it. Django adds random characters. */
const lockedHash = '!'

/** In bytes. A quote that is not closed would hide the rest of the file, and a file of another kind would be read into memory. */
const recordMax = 2 ** 20

/** What Postgres stores as it is. U+FFFD stands for bytes that were not UTF-8. */
const storable = /^[^\0\ufffd\p{Cs}]{1,500}$/u

/**
 * Adds users of another system from a file: CSV with a header, or JSON lines. Each has `mobile` and `password_hash`, and may have `name`
 * and `created_at`. Mobiles that have a user are skipped, so an import can be repeated, and can run beside the service. It writes no
 * events.
 *
 * @param counts are right also after a failure
 */
export async function importUsers(
  client: pg.Client,
  file: string,
  counts: ImportCounts,
  options: ImportOptions
): Promise<void> {
  const stream = createReadStream(file)
  let batch: ImportedUser[] = []
  const mobilesOfDryRun = new Set<string>()

  async function insertBatch(): Promise<void> {
    // Two imports that insert the same mobiles in another order would deadlock.
    batch.sort((a, b) => Number(a.mobile) - Number(b.mobile))
    await insert(batch)
    batch = []
    options.onProgress(stream.bytesRead)
  }
  async function insert(users: ImportedUser[]): Promise<void> {
    const column = (name: keyof ImportedUser) => users.map((user) => user[name])
    const values = [column('mobile'), column('password_hash'), column('name'), column('created_at')]
    try {
      const inserted = options.isDryRun
        ? await countNew(users)
        : ((await client.query(insertUsers, values)).rowCount ?? 0)
      counts.imported += inserted
      counts.skipped += users.length - inserted
    } catch (error) {
      // Postgres does not tell which row it refuses, for example by a constraint, or for a character that its encoding lacks.
      const isOfRow = error instanceof pg.DatabaseError && /^2[23]/.test(`${error.code}`)
      if (!isOfRow) throw error
      const [user, ...others] = users
      if (user && others.length === 0) return countBad(user.number, `Postgres refuses it (${error.code})`)
      await insert(users.slice(0, users.length / 2))
      await insert(users.slice(users.length / 2))
    }
  }
  async function countNew(users: ImportedUser[]): Promise<number> {
    const mobiles = [...new Set(users.map(({ mobile }) => mobile))].filter((mobile) => !mobilesOfDryRun.has(mobile))
    for (const mobile of mobiles) mobilesOfDryRun.add(mobile)
    const { rows } = await client.query('SELECT count(*)::int AS found FROM users WHERE mobile = ANY ($1)', [mobiles])
    return mobiles.length - rows[0].found
  }

  function countBad(number: number, reason: string): void {
    counts.bad++
    options.onBadLine(number, reason)
  }
  const isCsv = file.toLowerCase().endsWith('.csv')
  /** Where the last record, or the header, ended. */
  let lastLine = isCsv ? 1 : 0
  const parser = stream.pipe(
    parse({
      bom: true,
      // A line of JSON is a record of one column: no text of JSON has the delimiter.
      ...(isCsv ? { columns: checkHeader } : { columns: ['json'], delimiter: '\0', quote: false }),
      info: true,
      max_record_size: recordMax,
      skip_empty_lines: true,
      skip_records_with_error: true,
      on_record(record, { lines }) {
        lastLine = lines
        return record
      },
      on_skip(error) {
        const [first, last] = [lastLine + 1, Number(error?.lines)]
        // After this error csv-parse drops lines without a word.
        const isTooLong = error?.code === 'CSV_MAX_RECORD_SIZE'
        if (isTooLong) throw new Error(`line ${first}: its record is over 1 MiB, or a quote is not closed`)
        // Not its message: it may quote the line.
        countBad(last, first < last ? `the record since line ${first} cannot be parsed` : unparsable)
        lastLine = last
      }
    })
  )
  stream.on('error', (error) => parser.destroy(error))
  const records: AsyncIterable<{ record: Record<string, unknown>; info: Info }> = parser
  for await (const { record, info } of records) {
    const user = parseUser(info.lines, isCsv ? record : parseObject(`${record.json}`))
    if (typeof user === 'string') countBad(info.lines, user)
    else if (batch.push(user) === batchSize) await insertBatch()
  }
  await insertBatch()
}

const unparsable = 'it cannot be parsed'

function checkHeader(header: string[]): string[] {
  const missing = ['mobile', 'password_hash'].filter((name) => !header.includes(name))
  if (missing.length > 0) throw new Error(`the header has no ${missing.join(' and no ')}`)
  return header
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
function parseUser(number: number, record: Record<string, unknown> | undefined): ImportedUser | string {
  if (record === undefined) return unparsable
  const { mobile, password_hash, name, created_at } = record
  if (typeof mobile !== 'string' || !mobilePattern.test(mobile)) return 'the mobile is bad'
  if (typeof password_hash !== 'string' || password_hash === '') return 'the hash is empty'
  const isLocked = password_hash.startsWith(lockedHash)
  const isKnown = isLocked || (storable.test(password_hash) && verifierOf(password_hash) !== undefined)
  if (!isKnown) return 'the hash is of an unknown format, or costs too much'
  if (name && !(typeof name === 'string' && storable.test(name))) return 'the name is bad'
  const createdAt = created_at ? parseTime(created_at) : null
  if (createdAt === undefined) return 'created_at is no time'
  const storedHash = isLocked ? lockedHash : password_hash
  return { number, mobile, password_hash: storedHash, name: name ? `${name}` : mobile, created_at: createdAt }
}

/** Returns a time whose year has four digits: Postgres does not have all times that JavaScript has. */
function parseTime(text: unknown): Date | undefined {
  const time = typeof text === 'string' && /^\d{4}-\d\d-\d\d/.test(text) ? new Date(text) : undefined
  return Number.isNaN(time?.getTime()) ? undefined : time
}
