import { randomInt } from 'node:crypto'
import type { Redis } from 'ioredis'

export const code = '123456'
const password = 'a bench password'

/** Long enough for a whole benchmark. */
const codeTtlSeconds = 3_600

const codesPerPipeline = 1_000

/** Mobiles count up from a random one, so that two runs do not share any. */
let nextMobile = 13_000_000_000 + randomInt(5_000_000_000)

export const newMobiles = (count: number) => Array.from({ length: count }, () => `${nextMobile++}`)

export const signUpBody = (mobile: string, fields: object = {}) =>
  JSON.stringify({ mobile, sms_code: code, password, password2: password, ...fields })

/** The Redis key of a mobile's code. */
export const codeKey = (mobile: string) => `sms_code_${mobile}`

/** Writes a code for each of so many new mobiles to Redis, and returns the bodies of their sign-ups. */
export async function issueSignUps(redis: Redis, count: number): Promise<string[]> {
  const mobiles = newMobiles(count)
  for (let from = 0; from < count; from += codesPerPipeline) {
    const pipeline = redis.pipeline()
    for (const mobile of mobiles.slice(from, from + codesPerPipeline)) {
      pipeline.set(codeKey(mobile), code, 'EX', codeTtlSeconds)
    }
    await pipeline.exec()
  }
  return mobiles.map((mobile) => signUpBody(mobile))
}

export const mobileOf = (body: string): string => JSON.parse(body).mobile
