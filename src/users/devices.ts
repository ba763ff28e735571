import { randomUUID } from 'node:crypto'
import type { FastifyReply, FastifyRequest } from 'fastify'
import type { Config } from '../config/config.js'
import { cookieAttributes, cookieNameOf, cookieValues } from '../http/cookies.js'
import { SignedTokens } from '../http/signed-tokens.js'

const yearSeconds = 31_536_000

/**
 * Browsers in which a mobile was proved. Each keeps a token of the mobile that was proved last, as a cookie (the device cookies
 * of OWASP). A stranger has none, so the failed logins of strangers do not count for the owner.
 */
export class Devices {
  private readonly tokens
  private readonly cookieName

  constructor(private readonly config: Pick<Config, 'sessionSecrets' | 'cookieSecure'>) {
    this.tokens = new SignedTokens(config.sessionSecrets, 'device', yearSeconds * 1_000)
    this.cookieName = cookieNameOf('device', config.cookieSecure)
  }

  /** Sends a token with a new id. Failures with a copy of the former token do not count for the new one. */
  remember(reply: FastifyReply, mobile: string): void {
    const options = { ...cookieAttributes(this.config.cookieSecure), maxAge: yearSeconds }
    reply.setCookie(this.cookieName, this.tokens.issue(mobile, randomUUID()), options)
  }

  /** Returns the id in the token of a request, or undefined if it is forged, expired or for another mobile. */
  idOf(request: FastifyRequest, mobile: string): string | undefined {
    return cookieValues(request, this.cookieName).flatMap((token) => this.tokens.verify(token, mobile) ?? [])[0]
  }
}
