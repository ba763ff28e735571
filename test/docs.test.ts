import { existsSync, readdirSync, readFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import t from 'tap'
import { outcomeNames, outcomes } from '#src/outcomes.js'
import { checkGeneratedPart, describeVariables, markdownTable } from '../testkit/generated-docs.js'

const root = fileURLToPath(new URL('..', import.meta.url))
const read = (file: string) => readFileSync(join(root, file), 'utf8')

const pages = [root, join(root, 'docs'), join(root, 'examples')].flatMap((folder) =>
  readdirSync(folder)
    .filter((file) => file.endsWith('.md'))
    .map((file) => join(folder, file).slice(root.length))
)

/** Returns the anchors of a page as GitHub makes them from its headings. */
function anchorsOf(page: string): string[] {
  const text = read(page).replace(/^```[\s\S]*?^```/gm, '')
  return [...text.matchAll(/^#+ (.*)$/gm)].map(([, heading = '']) =>
    heading
      .toLowerCase()
      .replace(/[^\p{L}\p{N} _-]/gu, '')
      .replaceAll(' ', '-')
  )
}

t.test('every internal link of every page leads to a file and a heading', async (t) => {
  const links = pages.flatMap((page) =>
    [...read(page).matchAll(/\]\(([^)\s]+)\)/g)].map(([, target = '']) => ({ page, target }))
  )
  const internalLinks = links.filter(({ target }) => !/^[a-z]+:/.test(target))
  t.ok(internalLinks.length > 20)
  for (const { page, target } of internalLinks) {
    const [path = '', anchor] = target.split('#')
    const file = path === '' ? page : join(dirname(page), path)
    t.ok(existsSync(join(root, file)), `${page}: ${target}`)
    if (anchor !== undefined && file.endsWith('.md'))
      t.ok(anchorsOf(file).includes(anchor), `${page}: the heading of ${target}`)
  }
})

t.test('docs/operating.md lists every variable with its default and meaning', async (t) => {
  const rows = describeVariables().map(({ name, shownDefault, meaning }) => [`\`${name}\``, shownDefault, meaning])
  checkGeneratedPart(t, 'docs/operating.md', 'variables', markdownTable(['variable', 'default', 'meaning'], rows))
})

t.test('docs/api.md has every outcome with its status, errno and messages', async (t) => {
  const page = read('docs/api.md')
  for (const name of outcomeNames) {
    const { status, errno, zh, en } = outcomes[name]
    // The status of a bad request depends on what is wrong with it.
    const cells = name === 'bad_request' ? [errno, zh, en] : [`${status}`, errno, zh, en]
    const row = cells.join(' | ').replaceAll('{min}', '8').replaceAll('{max}', '128')
    t.ok(page.includes(`| ${row} |`), name)
  }
})
