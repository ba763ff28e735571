import { Type } from '@sinclair/typebox'
import type { RouteOutcomes } from '../outcomes.js'

/** A required text: absent, null and "" are all the same fault. Half a surrogate pair is no text. */
const required = { minLength: 1, format: 'well-formed' }

export const mobileField = Type.String({ ...required, pattern: '^1[3-9]\\d{9}$', examples: ['13812345678'] })
export const codeField = Type.String({ ...required, maxLength: 16, examples: ['123456'] })
/** Its length is a matter of code points, and an outcome of its own. */
export const passwordField = Type.String({ ...required, examples: ['correct horse'] })

/** Who is logged in. */
const user = {
  user_id: Type.String({ description: 'A 64-bit integer', examples: ['1'] }),
  name: Type.String({ description: 'At first the mobile', examples: ['13812345678'] }),
  mobile: Type.String({ examples: ['13812345678'] })
}

export const SessionUser = Type.Object(user)

/** Who has logged in. */
export const LoggedIn = Type.Object({
  ...user,
  session: Type.Boolean({
    description: 'False if the user is registered but the session could not be stored: the client logs in.',
    examples: [true]
  })
})

/** What a route may answer that has a store behind it. */
export const storedOutcomes = {
  storage_unavailable: undefined,
  busy: undefined,
  internal_error: undefined
} satisfies RouteOutcomes

/** What a route may answer that takes a body, too. */
export const bodyOutcomes = {
  missing_parameter: undefined,
  malformed_parameter: undefined,
  invalid_mobile: undefined,
  body_too_large: undefined,
  unsupported_content_type: undefined,
  ...storedOutcomes
} satisfies RouteOutcomes
