import type { FastifyError, FastifyReply, FastifyRequest } from 'fastify'
import fp from 'fastify-plugin'
import Negotiator from 'negotiator'
import { type Config, passwordMax } from '../config/config.js'
import { type Language, languages, type OutcomeDetails, type OutcomeName, outcomes, Refusal } from '../outcomes.js'

declare module 'fastify' {
  interface FastifyContextConfig {
    /** Whether the route is a probe: it keeps its status under LEGACY_STATUS and has no request log line. */
    isProbe?: boolean
  }
  interface FastifyReply {
    /** Sends an outcome as `{errno, errmsg, data?}`, in the language that the client prefers. */
    outcome(name: OutcomeName, details?: OutcomeDetails): FastifyReply
    /** The outcome that was sent, for the log and the metrics, or that nobody was there to receive one. */
    outcomeName: OutcomeName | 'client_disconnected' | undefined
  }
}

/** Returns the message of an outcome, with the bounds of a password's length filled in. */
export function messageOf(name: OutcomeName, language: Language, { passwordMin }: Pick<Config, 'passwordMin'>): string {
  return outcomes[name][language].replace('{min}', `${passwordMin}`).replace('{max}', `${passwordMax}`)
}

/** Returns all languages, the default first. */
export const byPreference = (defaultLanguage: Language): Language[] => [
  defaultLanguage,
  ...languages.filter((language) => language !== defaultLanguage)
]

/** Returns the language that the client prefers. */
export function languageOf(request: FastifyRequest, { defaultLanguage }: Pick<Config, 'defaultLanguage'>): Language {
  if (request.headers['accept-language'] === undefined) return defaultLanguage
  const preferred = new Negotiator(request).language(byPreference(defaultLanguage))
  return languages.find((language) => language === preferred) ?? defaultLanguage
}

/** Decorates replies with `reply.outcome()`, and turns refusals, Fastify's errors and bugs into outcomes. */
export const replies = fp<{ config: Config }>(
  async (fastify, { config }) => {
    fastify.decorateReply('outcomeName', undefined)
    fastify.decorateReply('outcome', function (this: FastifyReply, name: OutcomeName, details: OutcomeDetails = {}) {
      const outcome = outcomes[name]
      this.outcomeName = name
      // The legacy handler had no outcome for what HTTP parsing refuses, and no probes.
      const isLegacy = config.legacyStatus && name !== 'bad_request' && !this.routeOptions.config.isProbe
      this.code(isLegacy ? 200 : (details.status ?? outcome.status))
      const retryAfterSeconds =
        details.retryAfterSeconds ?? ('retryAfterSeconds' in outcome ? outcome.retryAfterSeconds : undefined)
      if (retryAfterSeconds !== undefined) this.header('retry-after', retryAfterSeconds)
      const { errno } = outcome
      const errmsg = messageOf(name, languageOf(this.request, config), config)
      if (this.raw.destroyed) queueMicrotask(() => endWithoutClient(this))
      return this.send(details.data === undefined ? { errno, errmsg } : { errno, errmsg, data: details.data })
    })

    fastify.setErrorHandler((error: FastifyError & Pick<OutcomeDetails, 'retryAfterSeconds'>, request, reply) => {
      // An unknown route is answered as such even if its body cannot be parsed.
      if (request.is404) return reply.outcome('no_such_route')
      if (error instanceof Refusal) {
        if (error.cause !== undefined) request.log.error({ err: error.cause }, error.outcome)
        return reply.outcome(error.outcome, error.details)
      }
      const name = outcomeOf(error)
      if (name === 'internal_error') request.log.error({ err: error }, name)
      reply.outcome(name, { retryAfterSeconds: error.retryAfterSeconds })
      // Nobody receives the answer.
      if (error.code === 'CLIENT_DISCONNECTED') reply.outcomeName = 'client_disconnected'
      return reply
    })
  },
  { fastify: '5.x', name: 'replies' }
)

/** The outcomes of errors from below and from Fastify, by their codes. None of them is a bug, so none is logged here. */
const outcomesByErrorCode: Partial<Record<string, OutcomeName>> = {
  STORE_UNAVAILABLE: 'storage_unavailable',
  QUEUE_FULL: 'busy',
  CLIENT_DISCONNECTED: 'busy',
  FST_ERR_CTP_BODY_TOO_LARGE: 'body_too_large',
  FST_ERR_CTP_INVALID_MEDIA_TYPE: 'unsupported_content_type'
}

function outcomeOf({ code, statusCode = 500 }: FastifyError): OutcomeName {
  return outcomesByErrorCode[code] ?? (statusCode < 500 ? 'malformed_parameter' : 'internal_error')
}

/**
 * Lets Fastify log and count a request whose client has disconnected. Fastify waits until the response has finished or failed,
 * and without a client it does neither.
 */
function endWithoutClient({ raw }: FastifyReply): void {
  // An 'error' without a listener would end the process.
  if (raw.listenerCount('error') > 0) raw.emit('error')
}
