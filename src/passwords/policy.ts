import { Type } from '@sinclair/typebox'
import { dictionary } from '@zxcvbn-ts/language-common'
import { passwordMax } from '../config/config.js'
import { requiredText } from '../http/schemas.js'
import type { OutcomeName } from '../outcomes.js'

/**
 * A new password. Its length is an outcome of its own and counts code points, so the schema has no bounds.
 *
 * NFKC is not stable for code points that are unassigned in the Unicode of this Node.js: under a later one the same password would have
 * another hash. So they are malformed, like half of a surrogate pair (RFC 8264, section 9.10).
 */
export const newPasswordField = Type.String({ ...requiredText, examples: ['correct horse'], pattern: '^\\P{Cn}*$' })

/**
 * The 49,233 common passwords of @zxcvbn-ts/language-common, from published breaches, in lower case. Those shorter than 8
 * characters never pass the length check.
 */
const commonPasswords: ReadonlySet<string> = new Set(dictionary['passwords-common'])

interface NewPassword {
  mobile: string
  password: string
  password2: string
}

/**
 * Returns the first fault of a new password in the order of the outcome table, or undefined. Lengths count code points of
 * the text as sent. There are no composition rules (NIST SP 800-63B, section 3.1.1.2).
 */
export function passwordFault(
  { mobile, password, password2 }: NewPassword,
  minLength: number
): OutcomeName | undefined {
  if (password !== password2) return 'passwords_differ'
  const { length } = [...password]
  if (length < minLength || length > passwordMax) return 'password_length'
  // As it is hashed: a common password in full-width letters would let its plain form log in.
  const canonical = password.normalize('NFKC')
  if (canonical === mobile || commonPasswords.has(canonical.toLowerCase())) return 'password_common'
  return undefined
}
