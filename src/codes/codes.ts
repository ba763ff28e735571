import { createHmac, randomInt } from 'node:crypto'
import fp from 'fastify-plugin'
import type { Result } from 'ioredis'
import type { Config } from '../config/config.js'
import { networksOf } from '../http/network.js'
import type { Observer } from '../telemetry/observer.js'
import { deriveKeys } from './derived-keys.js'
import { guessBudgets, unusedCodeLimits } from './limits.js'
import * as scripts from './scripts.js'
import { Tickets } from './tickets.js'

/*
 * The life of a code. docs/guarantees.md explains the protocol and its failures.
 *
 * 1. This service (`issue`) or another one stores the code in Redis.
 * 2. `claim` deletes the code and writes a claim record in one step. While the lease of the claim runs, every other request
 *    with this code is in progress. After the lease, a request with the same code can claim it again: a reclaim.
 * 3. The claim ends: `complete` after success, `restore` after a server-side failure, `discard` if there can be no success,
 *    `concede` if an earlier request with the code may have had the success.
 * 4. For 300 s after `complete`, the same request is a replay: it gets the same success, until `endReplay`. If Postgres has
 *    lost the row, `reopen` makes it a claim again.
 */

/** What a code is used for. After a claim for one purpose, the other purpose can neither replay nor reclaim the code. */
export type CodePurpose = 'sign_up' | 'password'

/** Who presents a code: a wrong one costs the holder of a valid ticket, or else the network. */
export interface Guesser {
  ticket: string | undefined
  address: string
}

/** One request's claim of a code. It is exclusive until the lease expires. */
export interface Claim {
  readonly mobile: string
  /** What a restore puts back. Empty after `reopen`: the claim record alone lets the same request try again. */
  readonly code: string
  /** The MAC of the code in the claim record. */
  readonly mac: string
  /** The TTL of the code when it was claimed, as PTTL returns it: negative if the code had none. */
  readonly ttlMs: number
  /** Identifies the claim: the time of Redis in µs when it began. */
  readonly claimId: string
  /** Whether an earlier request claimed the code and did not end the claim. It may have committed its row. */
  readonly isReclaim: boolean
  /** The purpose and the sends of the code's issue, as JSON; `{}` if another service wrote the code. */
  readonly issue: string
  /** When the code was claimed, by `performance.now()`. */
  readonly claimedAt: number
  /** Only after `reopen`: the user of the row that Postgres may have lost. */
  readonly lostUserId?: string
}

/** What a claim reads of the issue of a code. */
interface Issue {
  /** `at` is a time of Redis in µs. Absent if another service wrote the code. */
  sends?: { at: string; network: string }[]
}

/** A claim that an earlier run of the same request has completed. */
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
  /** The code is absent, expired, used, for another purpose, or wrong. */
  | { readonly state: 'wrong' }
  /** The guesser has no wrong codes left, so no code is compared, not even the right one. */
  | { readonly state: 'spent'; readonly retryAfterSeconds: number }

/** A code to send. */
interface IssuedCode {
  readonly code: string
  /** The remaining life of the code. */
  readonly ttlSeconds: number
}

interface Codes {
  /**
   * Returns the code of a mobile that this service has made for the same purpose, if at least half of its life is left:
   * people type the first of two messages. Otherwise creates a code of six random digits, which replaces the present one.
   *
   * @param purpose undefined: the code is for both
   * @param address that asks for the code
   */
  issue(mobile: string, purpose: CodePurpose | undefined, address: string): Promise<IssuedCode>
  /**
   * Withdraws a code that was certainly not sent, and puts the one that it has replaced back, unless that is used. A code that
   * another message may have delivered stays.
   */
  withdraw(mobile: string, code: string): Promise<void>
  /** Returns a ticket: it proves that the client that sends it has asked for a code of the mobile. */
  createTicket(mobile: string): string
  /** Claims the code of a mobile. A wrong code costs the guesser; the code stays. */
  claim(mobile: string, presentedCode: string, purpose: CodePurpose, guesser: Guesser): Promise<ClaimResult>
  /**
   * Puts the code back with its remaining TTL, unless a newer code exists. A withdrawal of the newer code then puts the claimed
   * one back.
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
  /**
   * Records the success, so that the same request can be replayed for 300 s. Resets the counts of wrong codes for the mobile,
   * and refunds the limits on unused codes for each message with this code.
   */
  complete(claim: Claim, userId: string): Promise<void>
  /**
   * Ends a reclaim that has met a user with another password. The earlier request may have created the user, so its retry
   * must still succeed.
   */
  concede(claim: Claim, userId: string): Promise<void>
  /**
   * Claims the code of a replay again, because Postgres has lost the row.
   *
   * @returns undefined if the replay has lasted too long, and another request has claimed the code
   */
  reopen(completed: CompletedClaim): Promise<Claim | undefined>
  /** Ends a replay, so that the next one can begin. After two wrong passwords the code cannot be replayed any more. */
  endReplay(completed: CompletedClaim, options: { passwordWasWrong: boolean }): Promise<void>
}

declare module 'fastify' {
  interface FastifyInstance {
    codes: Codes
  }
}

type ClaimScriptResult =
  | ['claimed', claimId: string, ttlMs: number, isReclaim: 0 | 1, issue: string, mac: string]
  | ['done', userId: string, claimId: string]
  | ['in_progress' | 'wrong']
  | ['spent', waitMs: number, budget: number]

declare module 'ioredis' {
  interface RedisCommander<Context> {
    claimCode(...keysAndArgs: (string | number)[]): Result<ClaimScriptResult, Context>
    endClaim(...keysAndArgs: (string | number)[]): Result<0 | 1, Context>
    completeClaim(...keysAndArgs: (string | number)[]): Result<0 | 1, Context>
    concedeClaim(recordKey: string, claimId: string, mac: string, userId: string, ttlMs: number): Result<null, Context>
    reopenClaim(
      recordKey: string,
      claimId: string,
      ttlMs: number
    ): Result<[claimId: string, mac: string] | null, Context>
    endReplay(recordKey: string, claimId: string, passwordWasWrong: 0 | 1): Result<null, Context>
    issueCode(...keysAndArgs: (string | number)[]): Result<[code: string, ttlMs: number], Context>
    withdrawCode(codeKey: string, issueKey: string, code: string): Result<null, Context>
  }
}

/** Do not change it: other services write codes under this key. */
const codeKey = (mobile: string) => `sms_code_${mobile}`

/** The braces are a hash tag: a script needs all its keys on one Cluster slot. The key has the older name of a claim. */
const recordKey = (mobile: string) => `{${codeKey(mobile)}}:attempt`
const issueKey = (mobile: string) => `{${codeKey(mobile)}}:issue`
const guessesKey = (mobile: string) => `{${codeKey(mobile)}}:guesses`

/** The names of the purposes in a MAC. With other names, requests could not be retried during an upgrade. */
const macTexts = { sign_up: 'sign-up', password: 'password' } as const satisfies Record<CodePurpose, string>

/** How long after its success a request can be replayed (G5). */
const replayTtlMs = 300_000

/** As long as the longest window of a guess budget. */
const guessesTtlMs = 86_400_000

export const codes = fp<{ config: Config; observer?: Observer | undefined }>(
  async (fastify, { config, observer }) => {
    const { sessionSecrets, smsCodeTtlS, hashMaxWaitMs, storeTimeoutMs } = config
    fastify.defineRedisScripts({
      claimCode: { numberOfKeys: 4, lua: scripts.claimCode },
      endClaim: { numberOfKeys: 3, lua: scripts.endClaim },
      completeClaim: { numberOfKeys: 4, lua: scripts.completeClaim },
      concedeClaim: { numberOfKeys: 1, lua: scripts.concedeClaim },
      reopenClaim: { numberOfKeys: 1, lua: scripts.reopenClaim },
      endReplay: { numberOfKeys: 1, lua: scripts.endReplay },
      issueCode: { numberOfKeys: 2, lua: scripts.issueCode },
      withdrawCode: { numberOfKeys: 2, lua: scripts.withdrawCode }
    })
    const tickets = new Tickets(sessionSecrets)

    // As long as a request normally takes at most: the wait for a hash thread and three round trips (claim, INSERT, session).
    // A slower request can outlive its lease. Then two requests hold the code, and the unique mobile in Postgres decides.
    const leaseMs = hashMaxWaitMs + 3 * storeTimeoutMs
    // Twice the lease: a retry after the lease must still find the record.
    const pendingTtlMs = Math.max(replayTtlMs, 2 * leaseMs)
    // A MAC, because a plain hash of six digits is reversed at once. Whoever reads Redis must not learn a claimed code, which
    // can be reclaimed or replayed. All secrets verify, so that retries survive a rotation.
    const [macKey, ...formerMacKeys] = deriveKeys(sessionSecrets, 'mobile-signup: code of an attempt')

    const endClaim = (claim: Claim, options: { restoredCode: string; mayBeCommitted: boolean }) =>
      fastify.withRedis((redis) =>
        redis.endClaim(
          codeKey(claim.mobile),
          recordKey(claim.mobile),
          issueKey(claim.mobile),
          claim.claimId,
          claim.mac,
          claim.ttlMs,
          claim.issue,
          pendingTtlMs,
          options.restoredCode,
          options.mayBeCommitted ? 1 : 0,
          // An earlier request may still complete a code that was reclaimed.
          claim.isReclaim ? 0 : leaseMs * 1_000
        )
      )

    /** Refunds the limits on unused codes for each message with a code that has been used. */
    async function refundSends({ mobile, issue, claimId, claimedAt }: Claim): Promise<void> {
      const { sends = [] }: Issue = JSON.parse(issue)
      if (sends.length === 0) return
      observer?.onCodeUsed()
      await Promise.all(
        sends.map(({ at, network }) => {
          const consumedAt = claimedAt - (Number(claimId) - Number(at)) / 1_000
          return fastify.rateLimits.refund(unusedCodeLimits(config, mobile, network), consumedAt)
        })
      )
    }

    fastify.decorate('codes', {
      async issue(mobile, purpose, address) {
        const newCode = `${randomInt(1_000_000)}`.padStart(6, '0')
        const lifeMs = smsCodeTtlS * 1_000
        const [{ network }] = networksOf(address)
        const [code, ttlMs] = await fastify.withRedis((redis) =>
          redis.issueCode(codeKey(mobile), issueKey(mobile), newCode, lifeMs, purpose ?? '', network, lifeMs / 2)
        )
        return { code, ttlSeconds: Math.floor(ttlMs / 1_000) }
      },
      async withdraw(mobile, code) {
        await fastify.withRedis((redis) => redis.withdrawCode(codeKey(mobile), issueKey(mobile), code))
      },
      createTicket: (mobile) => tickets.issue(mobile),
      async claim(mobile, presentedCode, purpose, { ticket, address }) {
        const macOf = (key: Buffer) =>
          createHmac('sha256', key).update(`${macTexts[purpose]}:${mobile}:${presentedCode}`).digest('base64url')
        const ticketId = ticket === undefined ? undefined : tickets.verify(ticket, mobile)
        const budgets = guessBudgets(config, ticketId, address)
        const result = await fastify.withRedis((redis) =>
          redis.claimCode(
            codeKey(mobile),
            recordKey(mobile),
            issueKey(mobile),
            guessesKey(mobile),
            presentedCode,
            purpose,
            leaseMs * 1_000,
            pendingTtlMs,
            guessesTtlMs,
            budgets.length,
            ...budgets.flatMap(({ field, max, windowMs }) => [field, max, windowMs]),
            macOf(macKey),
            ...formerMacKeys.map(macOf)
          )
        )
        switch (result[0]) {
          case 'claimed': {
            const [state, claimId, ttlMs, isReclaim, issue, mac] = result
            const claim = { mobile, code: presentedCode, mac, ttlMs, claimId, isReclaim: isReclaim === 1 }
            return { state, ...claim, issue, claimedAt: performance.now() }
          }
          case 'spent': {
            const [state, waitMs, budget] = result
            const spent = budgets[budget - 1]
            if (spent !== undefined) observer?.onLimitReached(spent.name)
            return { state, retryAfterSeconds: Math.ceil(waitMs / 1_000) }
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
      async complete(claim, userId) {
        const { mobile, code, mac, claimId } = claim
        const record = JSON.stringify({ state: 'done', mac, at: claimId, user_id: userId })
        const keys = [recordKey(mobile), guessesKey(mobile), codeKey(mobile), issueKey(mobile)]
        const isFirst = await fastify.withRedis((redis) => redis.completeClaim(...keys, record, replayTtlMs, mac, code))
        if (isFirst === 0) return
        await refundSends(claim).catch((err) =>
          fastify.log.error({ err }, 'the limits of a used code could not be refunded')
        )
      },
      async concede({ mobile, claimId, mac }, userId) {
        await fastify.withRedis((redis) => redis.concedeClaim(recordKey(mobile), claimId, mac, userId, replayTtlMs))
      },
      async reopen({ mobile, claimId: completedId, userId: lostUserId }) {
        const reopened = await fastify.withRedis((redis) =>
          redis.reopenClaim(recordKey(mobile), completedId, pendingTtlMs)
        )
        if (reopened === null) return undefined
        const [claimId, mac] = reopened
        const claimedAt = performance.now()
        return { mobile, code: '', mac, ttlMs: 0, claimId, isReclaim: true, issue: '{}', claimedAt, lostUserId }
      },
      async endReplay({ mobile, claimId }, { passwordWasWrong }) {
        await fastify.withRedis((redis) => redis.endReplay(recordKey(mobile), claimId, passwordWasWrong ? 1 : 0))
      }
    } satisfies Codes)
  },
  { fastify: '5.x', name: 'codes', dependencies: ['redis', 'rate-limits'] }
)
