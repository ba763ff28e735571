import { createHmac, hkdfSync, randomInt } from 'node:crypto'
import fp from 'fastify-plugin'
import type { Result } from 'ioredis'
import type { Config } from '../config/config.js'
import { claimCode, endClaim, endReplay, issueCode, withdrawCode } from './scripts.js'

/** What a code is presented for. A code that was claimed for one purpose can be neither repeated nor taken over for another. */
export type CodePurpose = 'sign-up' | 'password'

/** One request's exclusive hold on a code, and what it needs to end it. */
export interface Claim {
  readonly mobile: string
  readonly code: string
  /** The keyed MAC of the code in the claim record. */
  readonly mac: string
  /** The TTL that the code had when it was claimed; negative if it had none. */
  readonly ttlMs: number
  /** Identifies this claim among all claims of the code. */
  readonly claimedAt: string
  /** Whether an earlier request has claimed this code. Its row may have been committed. */
  readonly isReclaim: boolean
}

/** A claim that has succeeded, whose request was sent again. */
export interface CompletedClaim {
  readonly mobile: string
  readonly userId: string
  readonly claimedAt: string
}

/** The answer to a presented code. */
export type ClaimResult =
  | ({ readonly state: 'claimed' } & Claim)
  | ({ readonly state: 'done' } & CompletedClaim)
  /** Another request holds the code, or its instance died less than a lease ago. */
  | { readonly state: 'in_progress' }
  /** The code is absent, expired, used or wrong. */
  | { readonly state: 'wrong' }

/** A code that this service has created, and the code that it replaced. */
export interface IssuedCode {
  readonly mobile: string
  readonly code: string
  readonly former: string | null
  /** The remaining TTL of the former code; negative if it had none. */
  readonly formerTtlMs: number
}

/** The life of a code. docs/guarantees.md explains the protocol. */
interface Codes {
  /** Creates a code of six random digits for a mobile. It replaces the current one. */
  issue(mobile: string): Promise<IssuedCode>
  /** Withdraws a code that could not be sent, and puts the former one back. */
  withdraw(issued: IssuedCode): Promise<void>
  /**
   * Claims the code of a mobile. The code is gone from then on, and a claim record says who holds it. Until the lease has
   * expired nobody else can claim it, afterwards only a request that presents the same code. Wrong guesses are counted;
   * `SMS_CODE_ATTEMPTS` of them use the code up.
   */
  claim(mobile: string, presentedCode: string, purpose: CodePurpose): Promise<ClaimResult>
  /**
   * After a server-side failure, restores the code with its remaining TTL, unless a newer code exists.
   *
   * @param mayBeCommitted whether the write was sent, so that its row may exist
   */
  restore(claim: Claim, mayBeCommitted: boolean): Promise<void>
  /**
   * Uses the code up without success.
   *
   * @returns whether no other request has claimed the code since
   */
  discard(claim: Claim): Promise<boolean>
  /** Records the success. For 300 s the same request is answered with it again. */
  complete(claim: Claim, userId: string): Promise<void>
  /** Ends a replay. Until then the code is in progress. Two wrong passwords end the replays of this code. */
  endReplay(completed: CompletedClaim, passwordWasWrong: boolean): Promise<void>
}

declare module 'fastify' {
  interface FastifyInstance {
    codes: Codes
  }
}

type ClaimScriptResult =
  | ['claimed', claimedAt: string, ttlMs: number, isReclaim: 0 | 1]
  | ['done', userId: string, claimedAt: string]
  | ['in_progress' | 'wrong']

declare module 'ioredis' {
  interface RedisCommander<Context> {
    claimCode(code: string, record: string, ...args: (string | number)[]): Result<ClaimScriptResult, Context>
    endClaim(code: string, record: string, ...args: (string | number)[]): Result<0 | 1, Context>
    endReplay(record: string, claimedAt: string, passwordWasWrong: 0 | 1): Result<null, Context>
    issueCode(code: string, ...args: (string | number)[]): Result<[former: string | null, ttlMs: number], Context>
    withdrawCode(code: string, ...args: (string | number)[]): Result<null, Context>
  }
}

/** A contract with the services that write codes. */
const codeKey = (mobile: string) => `sms_code_${mobile}`

/** The braces put it on the Cluster slot of the code. */
const recordKey = (mobile: string) => `{${codeKey(mobile)}}:attempt`

/** How long a retry is safe (G5). A claim record lives longer if its code does. */
const recordTtlMs = 300_000

export const codes = fp<{ config: Config }>(
  async (fastify, { config: { sessionSecrets, smsCodeAttempts, smsCodeTtlS, hashMaxWaitMs, storeTimeoutMs } }) => {
    await fastify.withRedis(async (redis) => {
      redis.defineCommand('claimCode', { numberOfKeys: 2, lua: claimCode })
      redis.defineCommand('endClaim', { numberOfKeys: 2, lua: endClaim })
      redis.defineCommand('endReplay', { numberOfKeys: 1, lua: endReplay })
      redis.defineCommand('issueCode', { numberOfKeys: 1, lua: issueCode })
      redis.defineCommand('withdrawCode', { numberOfKeys: 1, lua: withdrawCode })
    })

    // The bound of G4: the wait for a thread, and three round trips (claim, INSERT, session). A request can take longer, if
    // the pool is full or the queue has grown. Then two requests hold the code, and Postgres decides.
    const leaseMs = hashMaxWaitMs + 3 * storeTimeoutMs
    const pendingTtlMs = Math.max(recordTtlMs, 2 * leaseMs)
    const derive = (secret: string, purpose: string) => Buffer.from(hkdfSync('sha256', secret, '', purpose, 32))
    // Keyed, because a plain hash of six digits is reversed at once: who reads Redis must not learn a claimed code.
    const macKeys = sessionSecrets.map((secret) => derive(secret, 'mobile-signup: code of an attempt'))
    const guessKey = derive(sessionSecrets[0], 'mobile-signup: guesses at a code').toString('base64url')

    const end = (claim: Claim, restoredCode: string, mayBeCommitted: boolean) =>
      fastify.withRedis((redis) =>
        redis.endClaim(
          codeKey(claim.mobile),
          recordKey(claim.mobile),
          claim.claimedAt,
          claim.mac,
          claim.ttlMs,
          pendingTtlMs,
          restoredCode,
          mayBeCommitted ? 1 : 0
        )
      )

    fastify.decorate('codes', {
      async issue(mobile) {
        const code = `${randomInt(1_000_000)}`.padStart(6, '0')
        const [former, formerTtlMs] = await fastify.withRedis((redis) =>
          redis.issueCode(codeKey(mobile), code, smsCodeTtlS * 1_000)
        )
        return { mobile, code, former, formerTtlMs }
      },
      async withdraw({ mobile, code, former, formerTtlMs }) {
        await fastify.withRedis((redis) => redis.withdrawCode(codeKey(mobile), code, former ?? '', formerTtlMs))
      },
      async claim(mobile, presentedCode, purpose) {
        const macs = macKeys.map((key) =>
          createHmac('sha256', key).update(`${purpose}:${mobile}:${presentedCode}`).digest('base64url')
        )
        const result = await fastify.withRedis((redis) =>
          redis.claimCode(
            codeKey(mobile),
            recordKey(mobile),
            presentedCode,
            smsCodeAttempts,
            leaseMs * 1_000,
            pendingTtlMs,
            guessKey,
            ...macs
          )
        )
        switch (result[0]) {
          case 'claimed': {
            const [state, claimedAt, ttlMs, isReclaim] = result
            const mac = macs[0] ?? ''
            return { state, mobile, code: presentedCode, mac, ttlMs, claimedAt, isReclaim: isReclaim === 1 }
          }
          case 'done': {
            const [state, userId, claimedAt] = result
            return { state, mobile, userId, claimedAt }
          }
          default:
            return { state: result[0] }
        }
      },
      async restore(claim, mayBeCommitted) {
        await end(claim, claim.code, mayBeCommitted)
      },
      async discard(claim) {
        return (await end(claim, '', false)) === 1
      },
      async complete({ mobile, mac, claimedAt }, userId) {
        const record = JSON.stringify({ state: 'done', mac, at: claimedAt, user_id: userId })
        await fastify.withRedis((redis) => redis.set(recordKey(mobile), record, 'PX', recordTtlMs))
      },
      async endReplay({ mobile, claimedAt }, passwordWasWrong) {
        await fastify.withRedis((redis) => redis.endReplay(recordKey(mobile), claimedAt, passwordWasWrong ? 1 : 0))
      }
    } satisfies Codes)
  },
  { fastify: '5.x', name: 'codes', dependencies: ['redis'] }
)
