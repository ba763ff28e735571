import { type TObject, type TProperties, type TSchema, Type } from '@sinclair/typebox'
import type { OutcomeName } from '../outcomes.js'

declare module 'fastify' {
  interface FastifyContextConfig {
    /** The outcomes with which the route may answer. A route without them is not in the OpenAPI description. */
    outcomes?: readonly OutcomeName[]
    /** The schemas of `data`, for those outcomes that carry any. */
    data?: Partial<Record<OutcomeName, TSchema>>
  }
}

/** The largest request body. A sign-up with the longest password has less than 2 KiB. */
export const bodyMaxBytes = 4 * 1_024

/** The keyword of a schema that names the outcome of its pattern. Other keywords have one outcome each. */
export const patternOutcomeKeyword = 'x-pattern-outcome'

/** A required text. Absent, null and "" are the same fault. Half of a surrogate pair is malformed. */
const required = { minLength: 1, format: 'well-formed' }

/** A string that must match a pattern, and the outcome if it does not. */
const patternField = (pattern: string, outcome: OutcomeName, example: string) =>
  Type.String({ ...required, pattern, [patternOutcomeKeyword]: outcome, examples: [example] })

export const mobileField = patternField('^1[3-9]\\d{9}$', 'invalid_mobile', '13812345678')
export const codeField = Type.String({ ...required, maxLength: 16, examples: ['123456'] })
/** The password policy checks its length, which counts code points and has an outcome of its own. */
export const passwordField = Type.String({ ...required, examples: ['correct horse'] })

const userFields = {
  user_id: Type.String({ description: 'A 64-bit integer', examples: ['1'] }),
  name: Type.String({ description: 'The mobile at first', examples: ['13812345678'] }),
  mobile: Type.String({ examples: ['13812345678'] })
}

/** The user of a session. */
export const SessionUserData = Type.Object(userFields)

/** The answer to a request that starts a session. */
export const LoggedInData = Type.Object({
  ...userFields,
  session: Type.Boolean({
    description: 'False if the user is stored but the session could not be: the client then logs in.',
    examples: [true]
  })
})

/** The outcomes of every route that uses a store. */
export const storeOutcomes = ['storage_unavailable', 'busy', 'internal_error'] as const satisfies readonly OutcomeName[]

/** The outcomes of every route that has a body with a mobile. */
export const bodyOutcomes = [
  'missing_parameter',
  'malformed_parameter',
  'invalid_mobile',
  'body_too_large',
  'unsupported_content_type',
  ...storeOutcomes
] as const satisfies readonly OutcomeName[]

/** The fields of every reply. */
const Envelope = Type.Object({ errno: Type.String(), errmsg: Type.String() })

/**
 * The response schemas of a route, one for each class of status.
 * `data` is optional in a success because `LEGACY_STATUS=true` gives refusals status 200, too.
 */
export function repliesWith<T extends TProperties>(data: TObject<T>) {
  return {
    '2xx': Type.Composite([Envelope, Type.Object({ data: Type.Optional(data) })]),
    '4xx': Envelope,
    '5xx': Envelope
  }
}
