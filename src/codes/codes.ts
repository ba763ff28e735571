import { createHmac, hkdfSync, randomInt } from 'node:crypto'
import fp from 'fastify-plugin'
import type { Result } from 'ioredis'
import type { Config } from '../config/config.js'
import { endReplay, issueCode, releaseCode, takeCode, withdrawCode } from './scripts.js'

/** A sign-up or a reset that has a code in hand, and what it needs to give it up. */
export interface Attempt {
  readonly mobile: string
  readonly code: string
  /** The code's, as the marker keeps it. */
  readonly mac: string
  /** The life that the code had left when it was taken; negative if it had no end. */
  readonly ttlMs: number
  /** Tells this attempt from any other with the same code. */
  readonly takenAt: string
  /** Whether an earlier attempt with this code may have done its work. */
  readonly again: boolean
}

/** The success of a code that is presented again. */
export interface CompletedAttempt {
  readonly userId: string
  readonly takenAt: string
}

/** What became of a presented code. */
export type Take =
  | ({ readonly state: 'taken' } & Attempt)
  | ({ readonly state: 'done' } & CompletedAttempt)
  /** Another request has it in hand, or had it when its instance died less than a lease ago. */
  | { readonly state: 'in_progress' }
  /** Absent, expired, used or wrong. */
  | { readonly state: 'wrong' }

/** A code that this service has made, and the one that it has replaced. */
export interface IssuedCode {
  readonly mobile: string
  readonly code: string
  readonly former: string | null
  /** The life that the former one had left; negative if it had no end. */
  readonly formerTtlMs: number
}

/** What a code is presented for. What one purpose has begun, another neither repeats nor takes over. */
export type CodePurpose = 'sign-up' | 'password'

/*
 * docs/guarantees.md has the whole protocol.
 */
interface Codes {
  /** Makes six random digits the code of a mobile for `SMS_CODE_TTL_S`. */
  issue(mobile: string): Promise<IssuedCode>
  /** Takes back a code that could not be sent: the one before it is there again. */
  withdraw(issued: IssuedCode): Promise<void>
  /**
   * Takes the SMS code of a mobile, which is gone from then on. A marker in Redis keeps who has it: in the time of a
   * lease nobody else can take it, and afterwards whoever presents it again. A wrong guess counts, and the last of
   * `SMS_CODE_ATTEMPTS` uses the code up.
   */
  take(mobile: string, presented: string, purpose: CodePurpose): Promise<Take>
  /**
   * Puts the code of an attempt that a fault of ours has ended back with the life that it had, unless a newer one has
   * come.
   *
   * @param mayBeDone whether the statement was sent, so that its work may be done or come yet
   */
  putBack(attempt: Attempt, mayBeDone: boolean): Promise<void>
  /**
   * Ends an attempt that can have no success: its code is used up.
   *
   * @returns whether no other attempt has had the code since
   */
  spend(attempt: Attempt): Promise<boolean>
  /** Ends an attempt that has done its work: for 300 s the code, again, is answered with the same success. */
  complete(attempt: Attempt, userId: string): Promise<void>
  /** Ends what `done` has begun: meanwhile the code is in progress. After two wrong passwords it is as used as any. */
  endReplay(mobile: string, takenAt: string, passwordWasWrong: boolean): Promise<void>
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
    releaseCode(code: string, marker: string, ...args: (string | number)[]): Result<0 | 1, Context>
    endReplay(marker: string, takenAt: string, wrong: 0 | 1): Result<null, Context>
    issueCode(code: string, ...args: (string | number)[]): Result<[former: string | null, ttlMs: number], Context>
    withdrawCode(code: string, ...args: (string | number)[]): Result<null, Context>
  }
}

/** The key is a contract with the services that write codes. */
const codeKey = (mobile: string) => `sms_code_${mobile}`

/** On the same slot of a Redis Cluster. */
const markerKey = (mobile: string) => `{${codeKey(mobile)}}:attempt`

/** How long a marker lives, unless its code would have lived longer: a retry in this time is safe (G5). */
const markerLifeMs = 300_000

export const codes = fp<
  Pick<Config, 'sessionSecrets' | 'smsCodeAttempts' | 'smsCodeTtlS' | 'hashMaxWaitMs' | 'storeTimeoutMs'>
>(
  async (fastify, { sessionSecrets, smsCodeAttempts, smsCodeTtlS, hashMaxWaitMs, storeTimeoutMs }) => {
    await fastify.onRedis(async (redis) => {
      redis.defineCommand('takeCode', { numberOfKeys: 2, lua: takeCode })
      redis.defineCommand('releaseCode', { numberOfKeys: 2, lua: releaseCode })
      redis.defineCommand('issueCode', { numberOfKeys: 1, lua: issueCode })
      redis.defineCommand('withdrawCode', { numberOfKeys: 1, lua: withdrawCode })
      redis.defineCommand('endReplay', { numberOfKeys: 1, lua: endReplay })
    })

    // G4's bound: the wait for a thread, and the take, the INSERT and the last trip. An attempt may be slower, in a pool
    // that is full or behind a queue that has grown; then two of them hold the code, and Postgres decides.
    const leaseMs = hashMaxWaitMs + 3 * storeTimeoutMs
    const pendingLifeMs = Math.max(markerLifeMs, 2 * leaseMs)
    const derive = (secret: string, purpose: string) => Buffer.from(hkdfSync('sha256', secret, '', purpose, 32))
    // Six digits are soon found from a plain hash. So Redis alone does not tell what the code was.
    const macKeys = sessionSecrets.map((secret) => derive(secret, 'mobile-signup: code of an attempt'))
    const guessKey = derive(sessionSecrets[0], 'mobile-signup: guesses at a code').toString('base64url')

    const release = ({ mobile, code, mac, ttlMs, takenAt }: Attempt, back: boolean, mayBeDone: boolean) =>
      fastify.onRedis((redis) =>
        redis.releaseCode(
          codeKey(mobile),
          markerKey(mobile),
          takenAt,
          mac,
          ttlMs,
          pendingLifeMs,
          back ? code : '',
          mayBeDone ? 1 : 0
        )
      )

    fastify.decorate('codes', {
      async issue(mobile) {
        const code = `${randomInt(1_000_000)}`.padStart(6, '0')
        const [former, formerTtlMs] = await fastify.onRedis((redis) =>
          redis.issueCode(codeKey(mobile), code, smsCodeTtlS * 1_000)
        )
        return { mobile, code, former, formerTtlMs }
      },
      async withdraw({ mobile, code, former, formerTtlMs }) {
        await fastify.onRedis((redis) => redis.withdrawCode(codeKey(mobile), code, former ?? '', formerTtlMs))
      },
      async take(mobile, presented, purpose) {
        const macs = macKeys.map((key) =>
          createHmac('sha256', key).update(`${purpose}:${mobile}:${presented}`).digest('base64url')
        )
        const taken = await fastify.onRedis((redis) =>
          redis.takeCode(
            codeKey(mobile),
            markerKey(mobile),
            presented,
            smsCodeAttempts,
            leaseMs * 1_000,
            pendingLifeMs,
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
      async putBack(attempt, mayBeDone) {
        await release(attempt, true, mayBeDone)
      },
      async spend(attempt) {
        return (await release(attempt, false, false)) === 1
      },
      async complete({ mobile, mac, takenAt }, userId) {
        const marker = { state: 'done', mac, at: takenAt, user_id: userId }
        await fastify.onRedis((redis) => redis.set(markerKey(mobile), JSON.stringify(marker), 'PX', markerLifeMs))
      },
      async endReplay(mobile, takenAt, passwordWasWrong) {
        await fastify.onRedis((redis) => redis.endReplay(markerKey(mobile), takenAt, passwordWasWrong ? 1 : 0))
      }
    } satisfies Codes)
  },
  { fastify: '5.x', name: 'codes', dependencies: ['redis'] }
)
