import { existsSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import t from 'tap'

const root = fileURLToPath(new URL('..', import.meta.url))
const read = (file: string) => readFileSync(join(root, file), 'utf8')

const page = read('docs/asvs.md')

/** The rows of all tables of requirements. */
const rows = [...page.matchAll(/^\| (\d[\d.]*) \| (.*?) \| .+? \| (.*?) \| (.*) \|$/gm)].map(
  ([, number = '', level = '', status = '', how = '']) => ({ number, level, status, how })
)

const statuses = ['met', 'not applicable', 'not met']

/** How many requirements of level 1 and of level 2 each chapter of ASVS 5.0.0 has. The other chapters do not apply. */
const requirements: Record<string, [level1: number, level2: number]> = {
  V1: [8, 19],
  V2: [4, 7],
  V3: [8, 11],
  V4: [2, 8],
  V6: [13, 22],
  V7: [6, 12],
  V8: [4, 3],
  V9: [4, 3],
  V11: [3, 11],
  V12: [3, 6],
  V13: [1, 12],
  V14: [2, 7],
  V15: [3, 10],
  V16: [0, 16]
}

const countOf = (matches: (row: (typeof rows)[number]) => boolean) => rows.filter(matches).length

t.test('docs/asvs.md has each requirement once, in the section of its chapter', async (t) => {
  const sections = [...page.matchAll(/^## (V\d+) .*\n([\s\S]*?)(?=^## )/gm)]
  t.strictSame(
    sections.map(([, chapter]) => chapter),
    Object.keys(requirements)
  )
  for (const [, chapter = '', text = ''] of sections) {
    const ofChapter = rows.filter(({ number }) => `V${number.split('.')[0]}` === chapter)
    for (const { number } of ofChapter) t.ok(text.includes(`\n| ${number} |`), `${number} is in ${chapter}`)
    const levels = ['1', '2'].map((level) => ofChapter.filter((row) => row.level === level).length)
    t.strictSame(levels, requirements[chapter], chapter)
  }
  const numbers = rows.map(({ number }) => number)
  t.strictSame(
    numbers.filter((number, index) => numbers.indexOf(number) !== index),
    []
  )
  for (const { number, level, status, how } of rows) {
    t.match(number, /^\d+\.\d+\.\d+$/)
    t.match(level, /^[12]$/, number)
    t.ok(statuses.includes(status), `${number}: ${status}`)
    t.not(how, '', number)
  }
})

t.test('the first paragraph of docs/asvs.md has the counts of the rows', async (t) => {
  const [, paragraph = ''] = page.split('\n\n')
  const text = paragraph.replaceAll('\n', ' ')
  const [met, notApplicable, notMet] = statuses.map((status) => countOf((row) => row.status === status))
  t.match(
    text,
    `Of ${rows.length} requirements in the chapters that apply, ${met} are met, ${notApplicable} are not applicable and ${notMet} are not met.`
  )
  for (const [level, phrase] of [
    ['1', 'Level 1 has N of them'],
    ['2', 'Level 2 has N']
  ] as const) {
    const total = countOf((row) => row.level === level)
    const counts = statuses.map(
      (status) => `${countOf((row) => row.level === level && row.status === status)} ${status}`
    )
    t.match(text, `${phrase.replace('N', `${total}`)}: ${counts.join(', ')}.`)
  }
})

t.test('every test that docs/asvs.md names exists', async (t) => {
  const references = [...page.matchAll(/`(test\/[\w-]+\.test\.ts): "([^`]+)"`/g)]
  t.ok(references.length > 50)
  for (const [, file = '', name = ''] of references)
    t.ok(existsSync(join(root, file)) && read(file).includes(name), `${file}: ${name}`)
  // A reference in another form would not be checked.
  t.equal(page.match(/`test\//g)?.length, references.length)
})

t.test('every path of src/, dev/, sql/, test/, deploy/ and scripts/ that docs/asvs.md names exists', async (t) => {
  const paths = [...page.matchAll(/(?<![\w/.])(?:src|dev|sql|test|deploy|scripts)\/[\w./-]*\w/g)].map(([path]) => path)
  t.ok(paths.length > 50)
  for (const path of paths) t.ok(existsSync(join(root, path)), path)
})

t.test('every name of the source that docs/asvs.md gives is in its file', async (t) => {
  const names = [...page.matchAll(/`((?:src|dev)\/[\w./-]+)` \(`(\w+)`\)/g)]
  t.ok(names.length > 15)
  for (const [, file = '', name = ''] of names) t.match(read(file), new RegExp(`\\b${name}\\b`), `${file}: ${name}`)
})

t.test('every requirement that is met names a test, a source or a page', async (t) => {
  for (const { number, how } of rows.filter(({ status }) => status === 'met'))
    t.match(how, /\b(?:test|src|dev|sql)\/|\.md\b|`\.dockerignore`/, number)
})

t.test('every requirement that is not met has a gap, and every gap names its requirements and its size', async (t) => {
  const gaps = [...page.matchAll(/^### (\d+)\. .*\n\n\*\*(SMALL|FEATURE)\*\*, ([\d., \n]*\d)\./gm)].map(
    ([, gap = '', size, numbers = '']) => ({ gap, size, numbers: numbers.split(/,\s+/) })
  )
  t.equal(gaps.length, page.match(/^### /gm)?.length)
  t.strictSame(
    gaps.map(({ gap }) => gap),
    gaps.map((_, index) => `${index + 1}`)
  )
  const [small, feature] = ['SMALL', 'FEATURE'].map((size) => gaps.filter((gap) => gap.size === size).length)
  const text = page.replaceAll('\n', ' ')
  t.match(text, `There are ${gaps.length} gaps.`)
  t.match(text, `(${small} gaps)`)
  t.match(text, `(${feature} gaps)`)
  const linked = rows
    .filter(({ status }) => status === 'not met')
    .map(({ number, how }) => `${number} ${/\[gap (\d+)\]\(#\1-[^)]+\)$/.exec(how)?.[1]}`)
  t.strictSame(linked.sort(), gaps.flatMap(({ gap, numbers }) => numbers.map((number) => `${number} ${gap}`)).sort())
})

t.test('every small gap says why it stays', async (t) => {
  for (const [, gap = '', text = ''] of page.matchAll(/^### (\d+)\. .*\n\n\*\*SMALL\*\*([\s\S]*?)(?=^##)/gm))
    t.match(text, /\bIt\s+stays\b/, `gap ${gap} says why it is still there`)
})
