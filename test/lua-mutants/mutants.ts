/** A change of one place in a Lua script. */
export interface Mutant {
  /** The script with the change. It may contain `${name}`, as in its file. */
  lua: string
  /** The line of the script, from 0. */
  line: number
  /** The changed line, with the place as `«before → after»`. It identifies the mutant. */
  change: string
}

interface Edit {
  start: number
  end: number
  text: string
}

interface Token {
  text: string
  start: number
  end: number
  /** Whether it is the first one of its line. */
  isFirst: boolean
}

/** What each operator is replaced by: its negation, its neighbours, or its counterpart. */
const operators = new Map([
  ['==', ['~=']],
  ['~=', ['==']],
  ['<', ['<=', '>=']],
  ['<=', ['<', '>']],
  ['>', ['>=', '<=']],
  ['>=', ['>', '<']],
  ['and', ['or']],
  ['or', ['and']],
  ['+', ['-']],
  ['*', ['/']],
  ['/', ['*']]
])

const functions = new Map([
  ['max', 'min'],
  ['min', 'max'],
  ['ceil', 'floor'],
  ['floor', 'ceil']
])

/** What some texts are replaced by. Any other text becomes empty. */
const texts = new Map([
  ["'0'", "'1'"],
  ["'1'", "'0'"],
  ["''", "'x'"],
  ["'pending'", "'unknown'"],
  ["'unknown'", "'done'"],
  ["'done'", "'pending'"],
  ["'%06d'", "'%d'"]
])

/** Options of SET, and whether a value follows. */
const options = new Map([
  ["'NX'", false],
  ["'KEEPTTL'", false],
  ["'PX'", true],
  ["'EX'", true]
])

/** Returns the mutants of a script. Some of them may not compile. */
export function mutantsOf(lua: string): Mutant[] {
  if (lua.includes('--')) throw new Error('a comment in a script would be mutated, too')
  const tokens = tokenize(lua)
  const edits = [...tokens.flatMap((_, index) => editsAt(tokens, index)), ...lineDeletions(lua)]
  const mutants = edits.map((edit) => applyTo(lua, edit))
  return [...new Map(mutants.map((mutant) => [mutant.lua, mutant])).values()]
}

function tokenize(lua: string): Token[] {
  // First the interpolation of another script.
  const pattern = /\$\{\w+\}|'[^']*'|\d+|[A-Za-z_]\w*|\.\.|[=~<>]=|\S/g
  return [...lua.matchAll(pattern)].map(({ 0: text, index }) => {
    const isFirst = /(^|\n) *$/.test(lua.slice(0, index))
    return { text, start: index, end: index + text.length, isFirst }
  })
}

function applyTo(lua: string, { start, end, text }: Edit): Mutant {
  const lineStart = lua.lastIndexOf('\n', start - 1) + 1
  const lineEnd = lua.indexOf('\n', end)
  const before = lua.slice(lineStart, start).trimStart()
  return {
    lua: lua.slice(0, start) + text + lua.slice(end),
    line: lua.slice(0, start).split('\n').length - 1,
    change: `${before}«${lua.slice(start, end)} → ${text}»${lua.slice(end, lineEnd)}`
  }
}

/** Returns the changes that begin at a token. */
function editsAt(tokens: readonly Token[], index: number): Edit[] {
  const token = tokens[index]
  if (token === undefined) return []
  const { text, start, end } = token
  const nextStart = tokens[index + 1]?.start ?? end
  const previous = tokens[index - 1]?.text ?? ''
  const replaceBy = (...replacements: string[]) => replacements.map((text) => ({ start, end, text }))

  if (/^\d/.test(text)) {
    // Index 0 of KEYS or ARGV is nil, which every command refuses.
    const smaller = previous === '[' && text === '1' ? [] : [`${Number(text) - 1}`]
    return replaceBy(`${Number(text) + 1}`, ...smaller)
  }
  if (text.startsWith("'")) return editsOfText(tokens, index, replaceBy)
  if (previous === '.') return replaceBy(...[functions.get(text) ?? []].flat())
  if (text === 'not') return [{ start, end: nextStart, text: '' }]
  // Not the sign of a number.
  if (text === '-') return /[\w)\]]$/.test(previous) && previous !== 'return' ? replaceBy('+') : []
  if (text === 'if' || text === 'elseif') {
    const then = tokens.findIndex(({ text }, other) => other > index && text === 'then')
    const condition = { start: nextStart, end: tokens[then - 1]?.end ?? end }
    return ['true', 'false'].map((text) => ({ ...condition, text }))
  }
  const isStatement = token.isFirst || ['then', 'do', 'else'].includes(previous)
  if (isStatement && (text === 'redis' || text === 'table')) {
    const parenthesis = tokens.findIndex(({ text }, other) => other > index && text === '(')
    return [{ start, end: closingOf(tokens, parenthesis).end, text: '' }]
  }
  return replaceBy(...(operators.get(text) ?? []))
}

function editsOfText(tokens: readonly Token[], index: number, replaceBy: (text: string) => Edit[]): Edit[] {
  const [beforePrevious, previous, token] = tokens.slice(index - 2, index + 1)
  if (previous === undefined || token === undefined) return []
  // The name of a command.
  if (beforePrevious?.text === 'call' && previous.text === '(') return []
  const hasValue = options.get(token.text)
  if (hasValue === undefined) return replaceBy(texts.get(token.text) ?? "''")
  const start = previous.text === ',' ? previous.start : token.start
  return [{ start, end: hasValue ? endOfArgument(tokens, index + 2) : token.end, text: '' }]
}

/** Returns the token that closes the parenthesis at an index. */
function closingOf(tokens: readonly Token[], index: number): Token {
  let depth = 0
  for (const token of tokens.slice(index)) {
    if (token.text === '(') depth++
    if (token.text === ')') depth--
    if (depth === 0) return token
  }
  throw new Error('a parenthesis is not closed')
}

/** Returns where the argument ends that begins at an index. */
function endOfArgument(tokens: readonly Token[], index: number): number {
  let depth = 0
  let end = 0
  for (const { text, ...token } of tokens.slice(index)) {
    if (depth === 0 && [',', ')', '}'].includes(text)) return end
    if (text === '(') depth++
    if (text === ')') depth--
    end = token.end
  }
  throw new Error('an argument does not end')
}

/** Returns the deletions of the lines that are an assignment or a `return`. */
function lineDeletions(lua: string): Edit[] {
  const pattern = /^ *(?! |for |if |elseif |else )((?:local )?[\w.[\], ]+ = .*|return\b.*)$/gm
  return [...lua.matchAll(pattern)].map(({ 0: line, 1: statement = '', index }) => {
    const end = index + line.length
    return { start: end - statement.length, end, text: '' }
  })
}
