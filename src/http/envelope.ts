import { isUtf8 } from 'node:buffer'
import { Ajv, type ErrorObject } from 'ajv'
import type { FastifyError, FastifyReply, FastifyRequest } from 'fastify'
import fp from 'fastify-plugin'
import Negotiator from 'negotiator'
import { type Config, passwordMax } from '../config/config.js'
import { type Language, languages, type OutcomeName, outcomes, Refusal } from '../outcomes.js'

declare module 'fastify' {
  interface FastifyContextConfig {
    /** Asked by a machine, often: it keeps its status under LEGACY_STATUS, and has no line in the log. */
    probe?: boolean
  }
  interface FastifyReply {
    /** Answers with an outcome of the table, in the language that the client prefers. */
    outcome(name: OutcomeName, data?: object): FastifyReply
    /** The outcome that was answered, for the log. */
    outcomeName: OutcomeName | undefined
  }
}

/**
 * Every reply as `{errno, errmsg, data?}`: `reply.outcome()`, and around the routes of its scope the strict validator
 * and the handlers that turn refusals, faults of the framework and bugs into outcomes.
 */
export const envelope = fp<Pick<Config, 'defaultLanguage' | 'legacyStatus' | 'passwordMin'>>(
  async (fastify, config) => {
    const byPreference = [
      config.defaultLanguage,
      ...languages.filter((language) => language !== config.defaultLanguage)
    ]

    function languageOf(request: FastifyRequest): Language {
      if (request.headers['accept-language'] === undefined) return config.defaultLanguage
      const preferred = new Negotiator(request).language(byPreference)
      return languages.find((language) => language === preferred) ?? config.defaultLanguage
    }

    function messageOf(name: OutcomeName, language: Language): string {
      return outcomes[name][language].replace('{min}', `${config.passwordMin}`).replace('{max}', `${passwordMax}`)
    }

    fastify.decorateReply('outcomeName', undefined)
    fastify.decorateReply('outcome', function (this: FastifyReply, name: OutcomeName, data?: object) {
      const outcome = outcomes[name]
      this.outcomeName = name
      // What HTTP parsing refuses is none of the legacy handler's outcomes, nor is a probe.
      const legacy = config.legacyStatus && name !== 'bad_request' && !this.routeOptions.config.probe
      this.code(legacy ? 200 : outcome.status)
      if ('retryAfterSeconds' in outcome && !this.hasHeader('retry-after')) {
        this.header('retry-after', outcome.retryAfterSeconds)
      }
      const errmsg = messageOf(name, languageOf(this.request))
      return this.send(data === undefined ? { errno: outcome.errno, errmsg } : { errno: outcome.errno, errmsg, data })
    })

    // Not Fastify's own settings of ajv, which coerce and strip, nor those of a host that registers the plugin.
    // `allErrors` and `verbose` let validationFault() find the fault to tell; the schemas are small and so are bodies.
    const ajv = new Ajv({ allErrors: true, verbose: true })
    ajv.addFormat('well-formed', (text: string) => text.isWellFormed())
    fastify.setValidatorCompiler(({ schema }) => ajv.compile(schema))
    fastify.setSchemaErrorFormatter((errors) => new Refusal(validationFault(errors)))

    // JSON only. An empty body is no body: DELETE is often sent with a content type and nothing to go with it.
    fastify.removeAllContentTypeParsers()
    const parseJson = fastify.getDefaultJsonParser('ignore', 'ignore')
    fastify.addContentTypeParser<Buffer>('application/json', { parseAs: 'buffer' }, (request, body, done) => {
      if (body.length === 0) done(null, undefined)
      // Decoding would replace what is not UTF-8, and make one password of many.
      else if (!isUtf8(body)) done(new Refusal('malformed_parameter'))
      else parseJson(request, body.toString(), done)
    })

    fastify.setErrorHandler((error: FastifyError, request, reply) => {
      // A body that cannot be parsed does not make a route out of none.
      const name = request.is404 ? 'no_such_route' : outcomeOf(error)
      const { cause } = error instanceof Refusal ? error : { cause: outcomes[name].status >= 500 ? error : undefined }
      if (cause !== undefined) request.log.error({ reqId: request.id, err: cause }, name)
      return reply.outcome(name)
    })
  },
  { fastify: '5.x', name: 'envelope' }
)

/**
 * The first fault in the order of the outcome table: absent (null and "" count), of a wrong type or too long, and last a
 * pattern, which only a mobile has.
 */
function validationFault(errors: readonly Partial<ErrorObject>[]): OutcomeName {
  const absent = errors.some(
    ({ keyword, data, instancePath }) =>
      keyword === 'required' || keyword === 'minLength' || (data === null && instancePath !== '')
  )
  if (absent) return 'missing_parameter'
  return errors.every(({ keyword }) => keyword === 'pattern') ? 'invalid_mobile' : 'malformed_parameter'
}

function outcomeOf(error: FastifyError): OutcomeName {
  if (error instanceof Refusal) return error.outcome
  const { statusCode = 500 } = error
  if (statusCode === 413) return 'body_too_large'
  if (statusCode === 415) return 'unsupported_content_type'
  return statusCode < 500 ? 'malformed_parameter' : 'internal_error'
}
