import { readdirSync, readFileSync } from 'node:fs'
import { dirname, join, relative } from 'node:path'
import { fileURLToPath } from 'node:url'
import t from 'tap'

/*
 * The rules of docs/architecture.md that no compiler checks.
 */

const src = fileURLToPath(new URL('../src', import.meta.url))

interface Import {
  from: string
  to: string
  isDynamic: boolean
}

const files = readdirSync(src, { recursive: true, encoding: 'utf8' }).filter((file) => file.endsWith('.ts'))

/** Every import between files of src, by their paths in src. */
const imports: Import[] = files.flatMap((from) => {
  const text = readFileSync(join(src, from), 'utf8')
  return [...text.matchAll(/(?:from |import |(import\())'(\.[^']+)'/g)].map(([, dynamic, specifier = '']) => {
    const path = relative(src, join(src, dirname(from), specifier))
    const to = files.includes(path) ? path : path.replace(/\.js$/, '.ts')
    return { from, to, isDynamic: dynamic !== undefined }
  })
})

const foundation = ['config', 'outcomes.ts']
const belowFeatures = ['http', 'stores', 'telemetry', ...foundation]
/** They know nothing of each other, and nothing of users. */
const features = ['codes', 'passwords', 'sessions']

/** What each folder, or file beside the folders, may import beside itself. */
const allowedImports: Record<string, string[]> = {
  'outcomes.ts': [],
  config: ['outcomes.ts'],
  telemetry: ['config'],
  stores: ['telemetry', 'config'],
  http: ['telemetry', ...foundation],
  ...Object.fromEntries(features.map((feature) => [feature, belowFeatures])),
  users: [...features, ...belowFeatures],
  'app.ts': [...features, 'users', ...belowFeatures],
  'index.ts': ['app.ts', 'config', 'stores'],
  'cli.ts': ['migrate.ts', 'server.ts'],
  'migrate.ts': ['config', 'stores', 'telemetry'],
  'server.ts': ['app.ts', 'config', 'name-lookups.ts', 'stores', 'telemetry', 'thread-pool.ts']
}

const placeOf = (file: string) => file.split('/')[0] ?? ''

t.test(
  'imports go one way, server → app → features → http, stores, telemetry → config, and never out of src',
  async (t) => {
    t.ok(imports.length > 50)
    for (const { from, to } of imports) {
      const [place, target] = [placeOf(from), placeOf(to)]
      t.ok(files.includes(to), `${from} imports ${to}, which is in src`)
      t.ok(place === target || allowedImports[place]?.includes(target), `${from} may import ${to}`)
    }
  }
)

t.test('no files import each other in a circle', async (t) => {
  /** Returns a circle that the path leads into. */
  function findCircle(path: string[]): string[] | undefined {
    const targets = imports.filter(({ from }) => from === path.at(-1)).map(({ to }) => to)
    for (const to of targets) {
      const circle = path.includes(to) ? [...path, to] : findCircle([...path, to])
      if (circle !== undefined) return circle
    }
    return undefined
  }
  for (const file of files) t.equal(findCircle([file])?.join(' → '), undefined, file)
})

t.test('OpenTelemetry is imported only on demand', async (t) => {
  const onDemand = imports.filter(({ to }) => to === 'telemetry/traces.ts')
  t.ok(onDemand.length > 0)
  for (const { from, isDynamic } of onDemand) t.ok(isDynamic, from)
})

t.test('only the entry points read the environment', async (t) => {
  const readers = files.filter((file) => readFileSync(join(src, file), 'utf8').includes('process.env'))
  t.strictSame(readers, ['migrate.ts', 'server.ts', 'thread-pool.ts'])
})
