import { randomInt, randomUUID } from 'node:crypto'
import type { FastifyBaseLogger } from 'fastify'
import type { Result } from 'ioredis'
import type { Config } from '../config/config.js'
import type { InFlight } from '../http/in-flight.js'
import { Refusal } from '../outcomes.js'
import type { RateLimits } from '../stores/rate-limits.js'
import type { RedisStore } from '../stores/redis.js'
import type { Observer } from '../telemetry/observer.js'
import { guessBudgets, unusedCodeLimits } from './limits.js'
import * as scripts from './scripts.js'
import { Tickets } from './tickets.js'

/** What a code is used for. */
export type CodePurpose = 'sign_up' | 'password'

/** A request that presents a code. A wrong one costs the holder of a valid ticket, or else the network. */
interface CodeRequest {
  readonly body: { readonly mobile: string; readonly sms_code: string; readonly ticket?: string }
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
  /** The id of the user for whom an earlier request has used the code. */
  readonly usedBy: string | undefined
  readonly log: FastifyBaseLogger
}

/** How a request ends that holds a code: see {@link scripts.releaseCode}. */
type Release = 'unused' | 'may_have_written' | 'used' | 'used_in_vain' | 'wrong_password'

/** A message with a code: the id of its units in the limits on unused codes, and the network that asked for it. */
export interface Send {
  id: string
  network: string
}

export interface Codes {
  /**
   * Returns the code of a mobile that this service has made, if at least half of its life is left: people type the first of two
   * messages. Otherwise makes a code of six random digits, which replaces the present one.
   *
   * @param purpose undefined: the code is for everything
   */
  issue(mobile: string, purpose: CodePurpose | undefined, send: Send): Promise<{ code: string; ttlSeconds: number }>
  /** Deletes a code whose only message was certainly not sent. */
  withdraw(mobile: string, code: string): Promise<void>
  /** Returns a ticket: it proves that the client that sends it has asked for a code of the mobile. */
  createTicket(mobile: string): string
  /**
   * Presents the code of a request, and holds it if it is right.
   *
   * @returns `used_in_vain` if an earlier request has used the code so; then this one does not hold it
   * @throws {Refusal} `wrong_code`; `busy` if another request holds the code; `too_many_requests` if the guesser has no wrong
   * codes left
   */
  hold(request: CodeRequest, purpose: CodePurpose): Promise<Hold | 'used_in_vain'>
  /**
   * Ends a hold.
   *
   * @param usedBy only with `used`: the id of the user
   * @returns whether the request has held the code until now; if not, another request may have used it. Undefined if Redis does not
   * answer: then the lease may have to end the hold.
   */
  release(hold: Hold, how: Release, usedBy?: string): Promise<boolean | undefined>
}

declare module 'ioredis' {
  interface RedisCommander<Context> {
    holdCode(
      ...keysAndArgs: (string | number)[]
    ): Result<
      | ['spent', waitMs: number, budget: number]
      | ['held', mayHaveWritten: 0 | 1, usedBy: string | null]
      | ['in_progress' | 'used_in_vain' | 'wrong'],
      Context
    >
    releaseCode(...keysAndArgs: (string | number)[]): Result<string | null, Context>
    issueCode(...keysAndArgs: (string | number)[]): Result<[code: string, ttlMs: number], Context>
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

/** The round trips of a sign-up whose code was taken over: hold, find, INSERT, find, release. */
const roundTripsMax = 5

export function createCodes(
  config: Config,
  redis: RedisStore,
  rateLimits: RateLimits,
  inFlight: InFlight,
  observer: Observer | undefined
): Codes {
  const { sessionSecrets, smsCodeTtlS, hashMaxWaitMs, storeTimeoutMs } = config
  redis.defineScripts({
    holdCode: { numberOfKeys: 4, lua: scripts.holdCode },
    releaseCode: { numberOfKeys: 2, lua: scripts.releaseCode },
    issueCode: { numberOfKeys: 2, lua: scripts.issueCode },
    withdrawCode: { numberOfKeys: 2, lua: scripts.withdrawCode }
  })
  const tickets = new Tickets(sessionSecrets)

  // A request can be slower, because HASH_MAX_WAIT_MS is an estimate. Then two requests hold the code, and the unique mobile in
  // Postgres decides.
  const leaseMs = hashMaxWaitMs + roundTripsMax * storeTimeoutMs
  // A retry after the lease must still find the claim.
  const claimTtlMs = Math.max(repeatMs, 2 * leaseMs)

  /** Refunds the limits on unused codes for each message with a code that is used. */
  async function refundSends(mobile: string, sends: Send[], log: FastifyBaseLogger): Promise<void> {
    observer?.onCodeUsed()
    const refunds = sends.map(({ id, network }) => rateLimits.refund(unusedCodeLimits(config, mobile, network), id))
    await Promise.all(refunds).catch((err) => log.error({ err }, 'the limits of a used code could not be refunded'))
  }

  return {
    async issue(mobile, purpose, { id, network }) {
      const newCode = `${randomInt(1_000_000)}`.padStart(6, '0')
      const lifeMs = smsCodeTtlS * 1_000
      const keys = [codeKey(mobile), issueKey(mobile)]
      const [code, ttlMs] = await redis.run((client) =>
        client.issueCode(...keys, newCode, lifeMs, purpose ?? 'any', id, network, lifeMs / 2)
      )
      return { code, ttlSeconds: Math.floor(ttlMs / 1_000) }
    },
    async withdraw(mobile, code) {
      await redis.run((client) => client.withdrawCode(codeKey(mobile), issueKey(mobile), code))
    },
    createTicket: (mobile) => tickets.issue(mobile),
    async hold({ body: { mobile, sms_code, ticket }, ip, log }, purpose) {
      const ticketId = ticket === undefined ? undefined : tickets.verify(ticket, mobile)
      const budgets = guessBudgets(config, ticketId, ip)
      const holder = randomUUID()
      const result = await redis.run((client) =>
        client.holdCode(
          codeKey(mobile),
          claimKey(mobile),
          issueKey(mobile),
          guessesKey(mobile),
          sms_code,
          purpose,
          holder,
          leaseMs,
          claimTtlMs,
          ...budgets.flatMap(({ field, max, windowMs }) => [field, max, windowMs])
        )
      )
      switch (result[0]) {
        case 'held': {
          const [, mayHaveWritten, usedBy] = result
          return { mobile, holder, log, mayHaveWritten: mayHaveWritten === 1, usedBy: usedBy ?? undefined }
        }
        case 'used_in_vain':
          return 'used_in_vain'
        case 'spent': {
          const [, waitMs, budget] = result
          const spent = budgets[budget - 1]
          if (spent !== undefined) observer?.onLimitReached(spent.name)
          throw new Refusal('too_many_requests', undefined, { retryAfterSeconds: Math.ceil(waitMs / 1_000) })
        }
        default:
          throw new Refusal(result[0] === 'wrong' ? 'wrong_code' : 'busy')
      }
    },
    async release({ mobile, holder, log }, how, usedBy = '') {
      try {
        const sends = await redis.run((client) =>
          client.releaseCode(claimKey(mobile), guessesKey(mobile), holder, claimTtlMs, how, usedBy)
        )
        // Not awaited: it does not delay the answer.
        if (sends) inFlight.track(refundSends(mobile, JSON.parse(sends), log))
        return sends !== null
      } catch (err) {
        log.error({ err }, 'a code could not be released')
        return undefined
      }
    }
  }
}
