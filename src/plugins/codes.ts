import { createHmac, hkdfSync } from 'node:crypto'
import fp from 'fastify-plugin'
import type { Result } from 'ioredis'
import type { Config } from '../config.js'
import { countWrongPassword, releaseCode, takeCode } from './code-scripts.js'

/** A sign-up that has a code in hand, and what it needs to give it up. */
export interface Attempt {
  readonly mobile: string
  readonly code: string
  /** The code's, as the marker keeps it. */
  readonly mac: string
  /** The life that the code had left when it was taken; negative if it had no end. */
  readonly ttlMs: number
  /** Tells this attempt from any other with the same code. */
  readonly takenAt: string
  /** Whether an earlier attempt with this code may have registered the user. */
  readonly again: boolean
}

/** What a code has led to that is presented again. */
export interface CompletedSignUp {
  readonly userId: string
  readonly takenAt: string
}

/** What became of a presented code. */
export type Take =
  | ({ readonly state: 'taken' } & Attempt)
  | ({ readonly state: 'done' } & CompletedSignUp)
  /** Another request has it in hand, or had it when its instance died less than a lease ago. */
  | { readonly state: 'in_progress' }
  /** Absent, expired, used or wrong. */
  | { readonly state: 'wrong' }

/*
 * docs/guarantees.md has the whole protocol.
 */
interface Codes {
  /**
   * Takes the SMS code of a mobile, which is gone from then on. A marker in Redis keeps who has it: in the time of a
   * lease nobody else can take it, and afterwards whoever presents it again. A wrong guess counts, and the last of
   * `SMS_CODE_ATTEMPTS` uses the code up.
   */
  take(mobile: string, presented: string): Promise<Take>
  /**
   * Puts the code of an attempt that a fault of ours has ended back with the life that it had, unless a newer one has
   * come.
   *
   * @param mayBeRegistered whether the INSERT was sent, so that its row may be there or come yet
   */
  putBack(attempt: Attempt, mayBeRegistered: boolean): Promise<void>
  /** Ends an attempt that has found its mobile registered: its code is used up. */
  spend(attempt: Attempt): Promise<void>
  /** Ends an attempt that has registered its user: for 300 s the code, again, is answered with the same success. */
  complete(attempt: Attempt, userId: string): Promise<void>
  /** Counts a wrong password for a completed sign-up; after the second its code is as used as any. */
  countWrongPassword(mobile: string, takenAt: string): Promise<void>
}

declare module 'fastify' {
  interface FastifyInstance {
    codes: Codes
  }
}

type TakeResult =
  | ['taken', at: string, ttlMs: number, again: 0 | 1]
  | ['done', string, string]
  | ['in_progress' | 'wrong']

declare module 'ioredis' {
  interface RedisCommander<Context> {
    takeCode(code: string, marker: string, ...args: (string | number)[]): Result<TakeResult, Context>
    releaseCode(code: string, marker: string, ...args: (string | number)[]): Result<null, Context>
    countWrongPassword(marker: string, takenAt: string): Result<null, Context>
  }
}

/** The key is a contract with the services that write codes. */
const codeKey = (mobile: string) => `sms_code_${mobile}`

/** On the same slot of a Redis Cluster. */
const markerKey = (mobile: string) => `{${codeKey(mobile)}}:attempt`

/** How long a marker lives, unless its code would have lived longer: a retry in this time is safe (G5). */
const markerLifeMs = 300_000

export const codes = fp<Pick<Config, 'sessionSecrets' | 'smsCodeAttempts' | 'hashMaxWaitMs' | 'storeTimeoutMs'>>(
  async (fastify, { sessionSecrets, smsCodeAttempts, hashMaxWaitMs, storeTimeoutMs }) => {
    await fastify.onRedis(async (redis) => {
      redis.defineCommand('takeCode', { numberOfKeys: 2, lua: takeCode })
      redis.defineCommand('releaseCode', { numberOfKeys: 2, lua: releaseCode })
      redis.defineCommand('countWrongPassword', { numberOfKeys: 1, lua: countWrongPassword })
    })

    // The whole of an attempt: the wait for a thread and three round trips.
    const leaseUs = (hashMaxWaitMs + 3 * storeTimeoutMs) * 1_000
    const derive = (secret: string, purpose: string) => Buffer.from(hkdfSync('sha256', secret, '', purpose, 32))
    // Six digits are soon found from a plain hash. So Redis alone does not tell what the code was.
    const macKeys = sessionSecrets.map((secret) => derive(secret, 'mobile-signup: code of an attempt'))
    const guessKey = derive(sessionSecrets[0], 'mobile-signup: guesses at a code').toString('base64url')

    const release = ({ mobile, code, mac, ttlMs, takenAt }: Attempt, back: boolean, mayBeRegistered: boolean) =>
      fastify.onRedis((redis) =>
        redis.releaseCode(
          codeKey(mobile),
          markerKey(mobile),
          takenAt,
          mac,
          ttlMs,
          markerLifeMs,
          back ? code : '',
          mayBeRegistered ? 1 : 0
        )
      )

    fastify.decorate('codes', {
      async take(mobile, presented) {
        const macs = macKeys.map((key) =>
          createHmac('sha256', key).update(`${mobile}:${presented}`).digest('base64url')
        )
        const taken = await fastify.onRedis((redis) =>
          redis.takeCode(
            codeKey(mobile),
            markerKey(mobile),
            presented,
            smsCodeAttempts,
            leaseUs,
            markerLifeMs,
            guessKey,
            ...macs
          )
        )
        switch (taken[0]) {
          case 'taken': {
            const [state, takenAt, ttlMs, again] = taken
            return { state, mobile, code: presented, mac: macs[0] ?? '', ttlMs, takenAt, again: again === 1 }
          }
          case 'done': {
            const [state, userId, takenAt] = taken
            return { state, userId, takenAt }
          }
          default:
            return { state: taken[0] }
        }
      },
      async putBack(attempt, mayBeRegistered) {
        await release(attempt, true, mayBeRegistered)
      },
      async spend(attempt) {
        await release(attempt, false, false)
      },
      async complete({ mobile, mac, takenAt }, userId) {
        const marker = { state: 'done', mac, at: takenAt, user_id: userId }
        await fastify.onRedis((redis) => redis.set(markerKey(mobile), JSON.stringify(marker), 'PX', markerLifeMs))
      },
      async countWrongPassword(mobile, takenAt) {
        await fastify.onRedis((redis) => redis.countWrongPassword(markerKey(mobile), takenAt))
      }
    } satisfies Codes)
  },
  { fastify: '5.x', name: 'codes', dependencies: ['redis'] }
)
