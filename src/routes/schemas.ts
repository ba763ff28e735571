import { Type } from '@sinclair/typebox'

/** A required text: absent, null and "" are all the same fault. Half a surrogate pair is no text. */
const required = { minLength: 1, format: 'well-formed' }

export const mobileField = Type.String({ ...required, pattern: '^1[3-9]\\d{9}$' })
export const codeField = Type.String({ ...required, maxLength: 16 })
/** Its length is a matter of code points, and an outcome of its own. */
export const passwordField = Type.String(required)

/** Who has logged in. */
export const LoggedIn = Type.Object({
  user_id: Type.String(),
  name: Type.String(),
  mobile: Type.String(),
  /** False if the user is registered but the session could not be stored: the client logs in. */
  session: Type.Boolean()
})
