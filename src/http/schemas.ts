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

/** A required text. Absent, null and "" are the same fault. Half of a surrogate pair is malformed. */
export const requiredText = { minLength: 1, format: 'well-formed' }

export const mobilePattern = /^1[3-9]\d{9}$/

/** The one field that every feature has. http/strict-json.ts knows the outcome of its pattern by the name `mobile`. */
export const mobileField = Type.String({ ...requiredText, pattern: mobilePattern.source, examples: ['13812345678'] })

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
