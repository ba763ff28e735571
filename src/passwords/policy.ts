import { dictionary } from '@zxcvbn-ts/language-common'
import { passwordMax } from '../config/config.js'
import type { OutcomeName } from '../outcomes.js'

/**
 * The common passwords of @zxcvbn-ts/language-common: 49,233 from published breaches, lower-cased there, of which those
 * shorter than 8 characters never pass the length anyway.
 */
const commonPasswords: ReadonlySet<string> = new Set(dictionary['passwords-common'])

interface NewPassword {
  mobile: string
  password: string
  password2: string
}

/**
 * The first fault of a new password in the order of the outcome table, or undefined.
 * Lengths are in code points of the text as sent; no composition rules (NIST SP 800-63B, 3.1.1.2).
 */
export function passwordFault({ mobile, password, password2 }: NewPassword, min: number): OutcomeName | undefined {
  if (password !== password2) return 'passwords_differ'
  const { length } = [...password]
  if (length < min || length > passwordMax) return 'password_length'
  if (password === mobile || commonPasswords.has(password.toLowerCase())) return 'password_common'
  return undefined
}
