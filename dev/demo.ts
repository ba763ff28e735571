import { randomInt } from 'node:crypto'
import { Redis } from 'ioredis'
import type { DestinationStream } from 'pino'

/** Long enough to read the README first. */
const codeTtlSeconds = 3_600

/** Writes a code for an unused mobile, as an SMS service would. */
async function writeDemoCode(redisUrl: string): Promise<{ mobile: string; code: string }> {
  const mobile = `1380${randomInt(10_000_000).toString().padStart(7, '0')}`
  const code = randomInt(1_000_000).toString().padStart(6, '0')
  const redis = new Redis(redisUrl)
  try {
    await redis.set(`sms_code_${mobile}`, code, 'EX', codeTtlSeconds)
  } finally {
    redis.disconnect()
  }
  return { mobile, code }
}

/** Returns what a first run prints: where the service listens, and a command that signs up as it is. */
export async function demoBanner(redisUrl: string, apiUrl: string): Promise<string> {
  const { mobile, code } = await writeDemoCode(redisUrl)
  const password = 'a demo password'
  const body = JSON.stringify({ mobile, sms_code: code, password, password2: password })
  return `
  Sign up at ${new URL('/', apiUrl).href}

  The API is at ${apiUrl}. Postgres and Redis are private and keep their data in .data/
  The SMS code of ${mobile} is ${code} for the next hour:

  curl -i ${apiUrl}/users -H 'Content-Type: application/json' -d '${body}'
`
}

/** The log for people. pino-pretty is a development dependency; production logs JSON. */
export async function prettyLog(): Promise<DestinationStream> {
  const { default: pretty } = await import('pino-pretty')
  return pretty({ singleLine: true, ignore: 'pid,hostname', translateTime: 'SYS:HH:MM:ss', sync: true })
}
