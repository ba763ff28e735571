import { isUtf8 } from 'node:buffer'
import { Ajv, type ErrorObject } from 'ajv'
import fp from 'fastify-plugin'
import { type OutcomeName, Refusal } from '../outcomes.js'

/** The largest request body. A sign-up with the longest password has less than 2 KiB. */
const bodyMaxBytes = 4 * 1_024

/** Accepts JSON bodies only, and validates them without coercing or removing anything. */
export const strictJson = fp(
  async (fastify) => {
    // An own Ajv, because Fastify's coerces and strips, and a host application may have other settings.
    // `allErrors` and `verbose` are for validationOutcome(). They are safe: schemas and bodies are small.
    const ajv = new Ajv({ allErrors: true, verbose: true })
    ajv.addFormat('well-formed', (text: string) => text.isWellFormed())
    fastify.setValidatorCompiler(({ schema }) => ajv.compile(schema))
    fastify.setSchemaErrorFormatter((errors) => new Refusal(validationOutcome(errors)))

    fastify.removeAllContentTypeParsers()
    // 'ignore' keeps fields such as `__proto__`: unknown fields are ignored, and no code reads these.
    const parseJson = fastify.getDefaultJsonParser('ignore', 'ignore')
    const options = { parseAs: 'buffer', bodyLimit: bodyMaxBytes } as const
    fastify.addContentTypeParser<Buffer>('application/json', options, (request, body, done) => {
      // A coded body would be read as plain text.
      if (!/^(?:identity)?$/i.test(request.headers['content-encoding'] ?? '')) {
        return done(new Refusal('unsupported_content_type'))
      }
      // Clients often send DELETE with a content type and an empty body.
      if (body.length === 0) done(null, undefined)
      // Decoding replaces invalid bytes, so that different passwords would become the same one.
      else if (!isUtf8(body)) done(new Refusal('malformed_parameter'))
      else parseJson(request, body.toString(), done)
    })
  },
  { fastify: '5.x', name: 'strict-json', dependencies: ['replies'] }
)

/**
 * Returns the first fault in the order of the outcome table: a field is absent (null and "" count), has a wrong type or
 * is too long, or the mobile does not match its pattern.
 */
function validationOutcome(errors: readonly Partial<ErrorObject>[]): OutcomeName {
  // Only required texts have a `minLength`. An optional field that is null has a wrong type. A body with `anyOf` needs one of
  // several fields.
  const isAbsent = ({ keyword, data, instancePath, parentSchema }: Partial<ErrorObject>) =>
    keyword === 'required' ||
    keyword === 'minLength' ||
    (keyword === 'anyOf' && instancePath === '') ||
    (data === null && parentSchema?.minLength !== undefined)
  if (errors.some(isAbsent)) return 'missing_parameter'
  const isOnlyMobile = errors.every(({ keyword, instancePath }) => keyword === 'pattern' && instancePath === '/mobile')
  return isOnlyMobile ? 'invalid_mobile' : 'malformed_parameter'
}
