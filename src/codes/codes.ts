import { createHmac, hkdfSync, randomInt } from 'node:crypto'
import fp from 'fastify-plugin'
import type { Result } from 'ioredis'
import type { Config } from '../config/config.js'
import * as scripts from './scripts.js'

/*
 * The life of a code. docs/guarantees.md explains the protocol and its failures.
 *
 * 1. This service (`issue`) or another one stores the code in Redis.
 * 2. `claim` deletes the code and writes a claim record in one step. While the lease of the claim runs, every other request
 *    with this code is in progress. After the lease, a request with the same code can claim it again: a reclaim.
 * 3. The claim ends: `complete` after success, `restore` after a server-side failure, `discard` if there can be no success.
 * 4. For 300 s after `complete`, the same request is a replay: it gets the same success, until `endReplay`.
 */

/** What a code is used for. After a claim for one purpose, the other purpose can neither replay nor reclaim the code. */
export type CodePurpose = 'sign-up' | 'password'

/** One request's claim of a code. It is exclusive until the lease expires. */
export interface Claim {
  readonly mobile: string
  readonly code: string
  /** The MAC of the code in the claim record. */
  readonly mac: string
  /** The TTL of the code when it was claimed, as PTTL returns it: negative if the code had none. */
  readonly ttlMs: number
  /** Identifies the claim: the time of Redis in µs when it began. */
  readonly claimId: string
  /** Whether an earlier request claimed the code and did not end the claim. It may have committed its row. */
  readonly isReclaim: boolean
}

/** A claim that succeeded earlier. The present request repeats its request. */
export interface CompletedClaim {
  readonly mobile: string
  readonly userId: string
  readonly claimId: string
}

/** The answer to a presented code. */
export type ClaimResult =
  | ({ readonly state: 'claimed' } & Claim)
  | ({ readonly state: 'done' } & CompletedClaim)
  /** Another request holds the code, a replay of it is running, or an instance died with it and the lease still runs. */
  | { readonly state: 'in_progress' }
  /** The code is absent, expired, used or wrong. */
  | { readonly state: 'wrong' }

/** A code that this service has created, and the code that it replaced. */
export interface IssuedCode {
  readonly mobile: string
  readonly code: string
  readonly previousCode: string | null
  /** The remaining TTL of the previous code, as PTTL returns it: negative if it had none. */
  readonly previousTtlMs: number
}

interface Codes {
  /** Creates a code of six random digits for a mobile. It replaces the current one. */
  issue(mobile: string): Promise<IssuedCode>
  /** Withdraws a code that could not be sent, and puts the previous one back. */
  withdraw(issued: IssuedCode): Promise<void>
  /** Claims the code of a mobile. A wrong code is counted; `SMS_CODE_ATTEMPTS` of them use the code up. */
  claim(mobile: string, presentedCode: string, purpose: CodePurpose): Promise<ClaimResult>
  /**
   * Puts the code back with its remaining TTL, unless a newer code exists.
   *
   * @param mayBeCommitted whether the write was sent to Postgres. Then the claim record stays, because the row may exist.
   */
  restore(claim: Claim, mayBeCommitted: boolean): Promise<void>
  /**
   * Uses the code up without success.
   *
   * @returns whether another request has taken the claim over since
   */
  discard(claim: Claim): Promise<{ wasTakenOver: boolean }>
  /** Records the success, so that the same request can be replayed for 300 s. */
  complete(claim: Claim, userId: string): Promise<void>
  /** Ends a replay, so that the next one can begin. After two wrong passwords the code cannot be replayed any more. */
  endReplay(completed: CompletedClaim, options: { passwordWasWrong: boolean }): Promise<void>
}

declare module 'fastify' {
  interface FastifyInstance {
    codes: Codes
  }
}

type ClaimScriptResult =
  | ['claimed', claimId: string, ttlMs: number, isReclaim: 0 | 1]
  | ['done', userId: string, claimId: string]
  | ['in_progress' | 'wrong']

declare module 'ioredis' {
  interface RedisCommander<Context> {
    claimCode(codeKey: string, recordKey: string, ...args: (string | number)[]): Result<ClaimScriptResult, Context>
    endClaim(codeKey: string, recordKey: string, ...args: (string | number)[]): Result<0 | 1, Context>
    endReplay(recordKey: string, claimId: string, passwordWasWrong: 0 | 1): Result<null, Context>
    issueCode(
      codeKey: string,
      code: string,
      ttlMs: number
    ): Result<[previousCode: string | null, previousTtlMs: number], Context>
    withdrawCode(codeKey: string, code: string, previousCode: string, previousTtlMs: number): Result<null, Context>
  }
}

/** Do not change it: other services write codes under this key. */
const codeKey = (mobile: string) => `sms_code_${mobile}`

/** The braces are a hash tag: a script needs both keys on one Cluster slot. The key has the older name of a claim. */
const recordKey = (mobile: string) => `{${codeKey(mobile)}}:attempt`

/** How long after its success a request can be replayed (G5). */
const replayTtlMs = 300_000

export const codes = fp<{ config: Config }>(
  async (fastify, { config: { sessionSecrets, smsCodeAttempts, smsCodeTtlS, hashMaxWaitMs, storeTimeoutMs } }) => {
    fastify.defineRedisScripts({
      claimCode: { numberOfKeys: 2, lua: scripts.claimCode },
      endClaim: { numberOfKeys: 2, lua: scripts.endClaim },
      endReplay: { numberOfKeys: 1, lua: scripts.endReplay },
      issueCode: { numberOfKeys: 1, lua: scripts.issueCode },
      withdrawCode: { numberOfKeys: 1, lua: scripts.withdrawCode }
    })

    // As long as a request normally takes at most: the wait for a hash thread and three round trips (claim, INSERT, session).
    // A slower request can outlive its lease. Then two requests hold the code, and the unique mobile in Postgres decides.
    const leaseMs = hashMaxWaitMs + 3 * storeTimeoutMs
    // Twice the lease: a retry after the lease must still find the record.
    const pendingTtlMs = Math.max(replayTtlMs, 2 * leaseMs)
    const derive = (secret: string, purpose: string) => Buffer.from(hkdfSync('sha256', secret, '', purpose, 32))
    // A MAC, because a plain hash of six digits is reversed at once. Whoever reads Redis must not learn a claimed code, which
    // can be reclaimed or replayed. All secrets verify, so that retries survive a rotation. The text is part of the key: with
    // another one, retries would fail during an upgrade.
    const macKeys = sessionSecrets.map((secret) => derive(secret, 'mobile-signup: code of an attempt'))
    // Tells whether guesses were made at the present code. It protects nothing: that code is in Redis in plain text.
    const guessKey = derive(sessionSecrets[0], 'mobile-signup: guesses at a code').toString('base64url')

    const endClaim = (claim: Claim, options: { restoredCode: string; mayBeCommitted: boolean }) =>
      fastify.withRedis((redis) =>
        redis.endClaim(
          codeKey(claim.mobile),
          recordKey(claim.mobile),
          claim.claimId,
          claim.mac,
          claim.ttlMs,
          pendingTtlMs,
          options.restoredCode,
          options.mayBeCommitted ? 1 : 0
        )
      )

    fastify.decorate('codes', {
      async issue(mobile) {
        const code = `${randomInt(1_000_000)}`.padStart(6, '0')
        const [previousCode, previousTtlMs] = await fastify.withRedis((redis) =>
          redis.issueCode(codeKey(mobile), code, smsCodeTtlS * 1_000)
        )
        return { mobile, code, previousCode, previousTtlMs }
      },
      async withdraw({ mobile, code, previousCode, previousTtlMs }) {
        await fastify.withRedis((redis) => redis.withdrawCode(codeKey(mobile), code, previousCode ?? '', previousTtlMs))
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
            const [state, claimId, ttlMs, isReclaim] = result
            // The script stores the first MAC. There is one, because there is a secret.
            const mac = macs[0] ?? ''
            return { state, mobile, code: presentedCode, mac, ttlMs, claimId, isReclaim: isReclaim === 1 }
          }
          case 'done': {
            const [state, userId, claimId] = result
            return { state, mobile, userId, claimId }
          }
          default:
            return { state: result[0] }
        }
      },
      async restore(claim, mayBeCommitted) {
        await endClaim(claim, { restoredCode: claim.code, mayBeCommitted })
      },
      async discard(claim) {
        const isOwnClaim = await endClaim(claim, { restoredCode: '', mayBeCommitted: false })
        return { wasTakenOver: isOwnClaim === 0 }
      },
      // Without a check whose claim it is: if another request has taken the code over, its success is the same row.
      async complete({ mobile, mac, claimId }, userId) {
        const record = JSON.stringify({ state: 'done', mac, at: claimId, user_id: userId })
        await fastify.withRedis((redis) => redis.set(recordKey(mobile), record, 'PX', replayTtlMs))
      },
      async endReplay({ mobile, claimId }, { passwordWasWrong }) {
        await fastify.withRedis((redis) => redis.endReplay(recordKey(mobile), claimId, passwordWasWrong ? 1 : 0))
      }
    } satisfies Codes)
  },
  { fastify: '5.x', name: 'codes', dependencies: ['redis'] }
)
