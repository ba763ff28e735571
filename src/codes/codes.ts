import { randomUUID } from 'node:crypto'
import type { FastifyBaseLogger } from 'fastify'
import type { Result } from 'ioredis'
import type { Config } from '../config/config.js'
import type { InFlight } from '../http/in-flight.js'
import { SignedTokens } from '../http/signed-tokens.js'
import { Refusal } from '../outcomes.js'
import type { Limit, RateLimits } from '../stores/rate-limits.js'
import type { RedisStore } from '../stores/redis.js'
import { bugLogger } from '../stores/store-unavailable.js'
import type { Observer } from '../telemetry/observer.js'
import { digitsOf, randomCode } from './code-format.js'
import { guessBudgets, guessLimits, unusedCodeLimits } from './limits.js'
import * as scripts from './scripts.js'

/** What a code is used for. */
export const codePurposes = ['sign_up', 'password', 'log_in', 'delete'] as const
export type CodePurpose = (typeof codePurposes)[number]

/** A request that presents a code. A wrong one costs the holder of a valid ticket, or else the network. */
export interface CodeRequest {
  readonly body: { readonly mobile: string; readonly sms_code: string; readonly ticket?: string | undefined }
  readonly ip: string
  readonly log: FastifyBaseLogger
}

/** One request works with a code, and nobody else, until it releases the code or its lease expires. */
export interface Hold {
  readonly mobile: string
  /** Identifies the request. */
  readonly holder: string
  /** Whether an earlier request with the code may have written to Postgres. */
  readonly mayHaveWritten: boolean
  /** What the first use of the code has left for its repeats: the id of the user, after a login `<id>.<session epoch>`. */
  readonly usedBy: string | undefined
  /** Of wrong codes over all mobiles; none with a ticket. */
  readonly limits: readonly Limit[]
  readonly log: FastifyBaseLogger
}

/** How a request ends that holds a code: see {@link scripts.releaseCode}. */
type Release = 'unused' | 'may_have_written' | 'used' | 'used_in_vain' | 'wrong_password'

/** A message with a code: the id of its units in the limits on unused codes, and the network that asked for it. */
export interface Send {
  id: string
  network: string
}

/** See {@link scripts.holdCode}. */
type HoldReply =
  | ['spent', waitMs: number, position: number]
  | ['held', mayHaveWritten: 0 | 1, usedBy: string | null]
  | ['wrong', isCounted: 0 | 1]
  | ['in_progress' | 'used_in_vain']

declare module 'ioredis' {
  interface RedisCommander<Context> {
    holdCode(numberOfKeys: number, ...keysAndArgs: (string | number)[]): Result<HoldReply, Context>
    releaseCode(numberOfKeys: number, ...keysAndArgs: (string | number)[]): Result<string | null, Context>
    issueCode(...keysAndArgs: (string | number)[]): Result<[code: string, ttlMs: number], Context>
    addPurpose(codeKey: string, issueKey: string, purpose: string): Result<null, Context>
    withdrawCode(codeKey: string, issueKey: string, code: string): Result<null, Context>
  }
}

/** Do not change it: other services write codes under this key. */
const codeKey = (mobile: string) => `sms_code_${mobile}`

/** The braces are a hash tag: a script needs all its keys on one Cluster slot. */
const claimKey = (mobile: string) => `{${codeKey(mobile)}}:claim`
const issueKey = (mobile: string) => `{${codeKey(mobile)}}:issue`
const guessesKey = (mobile: string) => `{${codeKey(mobile)}}:guesses`

/** How long a request can be repeated at least (G5). */
const repeatMs = 300_000

/** How long a ticket is valid. Its wrong codes count for twice as long (limits.ts). */
const ticketLifeMs = 3_600_000

/** The round trips of a sign-up whose code was taken over: hold, find, INSERT, find, release. */
const roundTripsMax = 5

export function createCodes(
  config: Config,
  redis: RedisStore,
  rateLimits: RateLimits,
  inFlight: InFlight,
  observer: Observer | undefined
) {
  const { sessionSecrets, smsCodeTtlS, hashMaxWaitMs, storeTimeoutMs } = config
  redis.defineScripts({
    holdCode: { lua: scripts.holdCode },
    releaseCode: { lua: scripts.releaseCode },
    issueCode: { numberOfKeys: 2, lua: scripts.issueCode },
    addPurpose: { numberOfKeys: 2, lua: scripts.addPurpose },
    withdrawCode: { numberOfKeys: 2, lua: scripts.withdrawCode }
  })
  const tickets = new SignedTokens(sessionSecrets, 'ticket', ticketLifeMs)

  // A request can be slower, because HASH_MAX_WAIT_MS is an estimate. Then two requests hold the code, and the unique mobile in
  // Postgres decides.
  const leaseMs = hashMaxWaitMs + roundTripsMax * storeTimeoutMs
  // A retry after the lease must still find the claim.
  const claimTtlMs = Math.max(repeatMs, 2 * leaseMs)

  /** Refunds the limits on unused codes for each message with a code that is used. */
  const refundSends = (mobile: string, sends: Send[]) =>
    Promise.all(sends.map(({ id, network }) => rateLimits.refund(unusedCodeLimits(config, mobile, network), id)))

  /** Does not wait for a refund: it does not delay the answer. */
  function refundLater(refund: Promise<unknown>, log: FastifyBaseLogger): void {
    inFlight.track(refund.catch(bugLogger(log, 'the limits of a code could not be refunded')))
  }

  /** In a Cluster the limits on wrong codes over all mobiles are on another slot than the code, and change in a step of their own. */
  const split = (limits: readonly Limit[]) =>
    redis.isCluster ? { inScript: [], outsideScript: limits } : { inScript: limits, outsideScript: [] }

  return {
    /** Returns the code for the next message: see {@link scripts.issueCode}. Without a purpose the code serves everything. */
    async issue(mobile: string, purpose: CodePurpose | undefined, { id, network }: Send) {
      const lifeMs = smsCodeTtlS * 1_000
      const keys = [codeKey(mobile), issueKey(mobile)]
      const [code, ttlMs] = await redis.run((client) =>
        client.issueCode(...keys, randomCode(), lifeMs, purpose ?? 'any', id, network, lifeMs / 2)
      )
      return { code, ttlSeconds: Math.floor(ttlMs / 1_000) }
    },
    /** Lets the present code of a mobile, if this service has made it, serve a further purpose. */
    async addPurpose(mobile: string, purpose: CodePurpose | undefined): Promise<void> {
      await redis.run((client) => client.addPurpose(codeKey(mobile), issueKey(mobile), purpose ?? 'any'))
    },
    /** Deletes a code whose only message was certainly not sent. */
    async withdraw(mobile: string, code: string): Promise<void> {
      await redis.run((client) => client.withdrawCode(codeKey(mobile), issueKey(mobile), code))
    },
    /** Returns a ticket: it proves that the client that sends it has asked for a code of the mobile. */
    createTicket: (mobile: string) => tickets.issue(mobile),
    /**
     * Presents the code of a request, and holds it if it is right.
     *
     * @returns `used_in_vain` if an earlier request has used the code so; then this one does not hold it
     * @throws {Refusal} `wrong_code`; `busy` if another request holds the code; `too_many_requests` if the guesser, or all without
     * a ticket, have no wrong codes left
     */
    async hold(request: CodeRequest, purpose: CodePurpose): Promise<Hold | 'used_in_vain'> {
      const { body, ip, log } = request
      const { mobile, sms_code, ticket } = body
      const ticketId = ticket === undefined ? undefined : tickets.verify(ticket, mobile)
      const budgets = guessBudgets(config, ticketId, ip)
      const limits = ticketId === undefined ? guessLimits(config, ip) : []
      const holder = randomUUID()
      const keys = [codeKey, claimKey, issueKey, guessesKey].map((keyOf) => keyOf(mobile))
      const { inScript, outsideScript } = split(limits)
      // Before the code is presented, so that parallel guesses cannot slip through.
      const retryAfterSeconds = await rateLimits.consume(outsideScript, holder)
      if (retryAfterSeconds > 0) throw new Refusal('too_many_requests', undefined, { retryAfterSeconds })
      let result: HoldReply | undefined
      try {
        result = await redis.run((client) =>
          client.holdCode(
            keys.length + inScript.length,
            ...keys,
            ...inScript.map(({ key }) => key),
            sms_code,
            digitsOf(sms_code),
            purpose,
            holder,
            leaseMs,
            claimTtlMs,
            ...inScript.flatMap(({ max, seconds }) => [max, seconds * 1_000]),
            ...budgets.flatMap(({ field, max, windowMs }) => [field, max, windowMs])
          )
        )
      } finally {
        const isCounted = result?.[0] === 'wrong' && result[1] === 1
        if (!isCounted && outsideScript.length > 0) refundLater(rateLimits.refund(outsideScript, holder), log)
      }
      switch (result[0]) {
        case 'held': {
          const [, mayHaveWritten, usedBy] = result
          return { mobile, holder, limits, log, mayHaveWritten: mayHaveWritten === 1, usedBy: usedBy ?? undefined }
        }
        case 'used_in_vain':
          return 'used_in_vain'
        case 'spent': {
          const [, waitMs, position] = result
          const spent = [...inScript, ...budgets][position - 1]
          if (spent !== undefined) observer?.onLimitReached(spent.name)
          throw new Refusal('too_many_requests', undefined, { retryAfterSeconds: Math.ceil(waitMs / 1_000) })
        }
        default:
          throw new Refusal(result[0] === 'wrong' ? 'wrong_code' : 'busy')
      }
    },
    /**
     * Ends a hold.
     *
     * @param usedBy only with `used`: the id of the user, or '' if there is none; a login adds its session epoch
     * @returns whether the request has held the code until now; if not, another request may have used it. Undefined if Redis does
     * not answer: then the lease may have to end the hold.
     */
    async release(hold: Hold, how: Release, usedBy = ''): Promise<boolean | undefined> {
      const { mobile, holder, limits, log, usedBy: formerUser } = hold
      const { inScript, outsideScript } = split(limits)
      const keys = [claimKey(mobile), guessesKey(mobile), ...inScript.map(({ key }) => key)]
      try {
        const sends = await redis.run((client) =>
          client.releaseCode(keys.length, ...keys, holder, claimTtlMs, how, usedBy)
        )
        if (sends) {
          observer?.onCodeUsed()
          refundLater(refundSends(mobile, JSON.parse(sends)), log)
        }
        const isFirstUse = how === 'used' && formerUser === undefined && sends !== null
        if (isFirstUse && outsideScript.length > 0) refundLater(rateLimits.refundNewest(outsideScript), log)
        return sends !== null
      } catch (error) {
        bugLogger(log, 'a code could not be released')(error)
        return undefined
      }
    }
  }
}
