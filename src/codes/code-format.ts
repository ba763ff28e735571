import { randomInt } from 'node:crypto'

/** Returns a new code: six random digits. */
export const randomCode = () => `${randomInt(1_000_000)}`.padStart(6, '0')

/** The longest `sms_code` in a request, in characters. A code that is pasted twice, with spaces and invisible marks, has about 30. */
export const presentedMaxLength = 64

/** What a messenger or a keyboard adds: white space, hyphens and dashes, and characters that nobody sees. */
const additions = /[\s\p{Dash}\p{Control}\p{Format}\p{Default_Ignorable_Code_Point}\u2800]/gu

/**
 * Returns the six digits that a person has typed or pasted, for example `123456` for `１２３ ４５６`, or '' if the text cannot be a
 * code of this service. The same six pasted twice are once.
 */
export function digitsOf(presented: string): string {
  const [, digits = ''] = /^(\d{6})\1?$/.exec(presented.normalize('NFKC').replace(additions, '')) ?? []
  return digits
}
