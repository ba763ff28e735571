import t from 'tap'
import { digitsOf, randomCode } from '#src/codes/code-format.js'

/*
 * What a code of this service looks like, and in which dress people present it. test/codes.test.ts has what it costs.
 */

const inDress: Record<string, string> = {
  'as it is': '012345',
  'full-width digits': '０１２３４５',
  'mathematical digits': '𝟎𝟏𝟐𝟑𝟒𝟓',
  'circled digits': '⓪①②③④⑤',
  'superscript digits': '⁰¹²³⁴⁵',
  'half full-width': '０１２345',
  'a space': '012 345',
  'a space after each digit': '0 1 2 3 4 5 ',
  'an ideographic space': '012\u3000345',
  'a no-break space': '012\u00a0345',
  'a narrow no-break space': '012\u202f345',
  'a tab and line ends': '\t012345\r\n',
  'a hyphen': '012-345',
  'a full-width hyphen': '012－345',
  'a non-breaking hyphen': '012‑345',
  'a dash': '012–345',
  'a minus sign': '012−345',
  'a soft hyphen': '012\u00ad345',
  'a zero-width space': '012\u200b345',
  'a zero-width joiner': '0\u200d12345',
  'a byte order mark': '\ufeff012345',
  'marks for left to right': '\u202a012345\u202c\u200e',
  'isolates, as phones copy a number': '\u2068012345\u2069',
  'a variation selector': '0\ufe0f12345',
  'a Hangul filler': '012345\u3164',
  'a control character': '012345\u0000',
  'a braille blank': '012\u2800345',
  'pasted twice': '012345012345',
  'pasted twice, with a space': '012345 012345',
  'pasted twice, in two dresses': '012-345\n０１２ ３４５',
  'pasted twice, with a space after each': '0 1 2 3 4 5 0 1 2 3 4 5'
}

const noCode: Record<string, string> = {
  'five digits': '01234',
  'seven digits': '0123456',
  'two different codes': '012345012346',
  'pasted three times': '012345012345012345',
  nothing: ' - ',
  letters: 'abcdef',
  'a letter O': 'O12345',
  'a dot': '012.345',
  'a sign': '+012345',
  'digits of another script': '٠١٢٣٤٥',
  'an exponent': '1e5000',
  text: 'Your code is 012345'
}

t.test('six digits are the same in every dress', async (t) => {
  for (const [name, text] of Object.entries(inDress)) t.equal(digitsOf(text), '012345', name)
})

t.test('what has no six digits, or something else beside them, cannot be a code', async (t) => {
  for (const [name, text] of Object.entries(noCode)) t.equal(digitsOf(text), '', name)
})

t.test('a new code is in its own dress', async (t) => {
  for (let n = 0; n < 100; n++) {
    const code = randomCode()
    t.equal(digitsOf(code), code)
  }
})
