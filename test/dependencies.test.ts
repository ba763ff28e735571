import { readdirSync, readFileSync } from 'node:fs'
import { dirname, join, relative } from 'node:path'
import { fileURLToPath } from 'node:url'
import t from 'tap'
import { runNode } from '../testkit/run-node.js'

/*
 * What may depend on what: the folders of src (docs/architecture.md), and the service on packages.
 */

const src = fileURLToPath(new URL('../src', import.meta.url))
const files = readdirSync(src, { recursive: true, encoding: 'utf8' }).filter((file) => file.endsWith('.ts'))

const belowFeatures = ['http', 'stores', 'telemetry', 'config', 'outcomes.ts']
/** They know nothing of each other, and nothing of users. */
const features = ['codes', 'events', 'passwords', 'sessions']

/** What each folder, or file beside the folders, may import beside itself. */
const allowedImports: Record<string, string[]> = {
  config: ['outcomes.ts'],
  telemetry: ['config'],
  stores: ['telemetry', 'config'],
  http: ['telemetry', 'config', 'outcomes.ts'],
  ...Object.fromEntries(features.map((feature) => [feature, belowFeatures])),
  users: [...features, ...belowFeatures],
  'app.ts': [...features, 'users', ...belowFeatures],
  'index.ts': ['app.ts', 'config', 'stores'],
  'cli.ts': ['import.ts', 'migrate.ts', 'server.ts'],
  'import.ts': ['config', 'telemetry', 'users'],
  'migrate.ts': ['config', 'stores', 'telemetry'],
  'server.ts': ['app.ts', 'config', 'name-lookups.ts', 'stores', 'telemetry', 'thread-pool.ts']
}

t.test('imports go one way, server → app → features → http, stores, telemetry → config', async (t) => {
  const placeOf = (file: string) => file.split('/')[0] ?? ''
  for (const from of files) {
    const specifiers = readFileSync(join(src, from), 'utf8').matchAll(/(from |import |import\()'(\.[^']+)'/g)
    for (const [, keyword, specifier = ''] of specifiers) {
      const to = placeOf(relative(src, join(src, dirname(from), specifier)).replace(/\.js$/, '.ts'))
      const isAllowed = placeOf(from) === to || allowedImports[placeOf(from)]?.includes(to)
      t.ok(isAllowed, `${from} imports ${specifier}`)
      if (specifier.endsWith('/traces.js')) t.equal(keyword, 'import(', 'OpenTelemetry is loaded on demand')
    }
  }
})

/** Licences that let anybody run, change and pass on the service, also as part of a closed product. */
const allowedLicences = new Set(['0BSD', 'Apache-2.0', 'BSD-2-Clause', 'BSD-3-Clause', 'BlueOak-1.0.0', 'ISC', 'MIT'])

interface Sbom {
  components: {
    name: string
    version: string
    licenses?: { license?: { id?: string; name?: string }; expression?: string }[]
  }[]
}

t.test('the bill of materials lists every runtime dependency, each with an allowed licence', async (t) => {
  const { code, stdout } = await runNode(['scripts/sbom.js'], process.env)
  t.equal(code, 0)
  const { components }: Sbom = JSON.parse(stdout)
  const { packages }: { packages: Record<string, { version: string; dev?: boolean }> } = JSON.parse(
    readFileSync('package-lock.json', 'utf8')
  )
  const runtime = Object.entries(packages)
    .filter(([path, { dev }]) => path !== '' && !dev)
    .map(([path, { version }]) => `${path.replace(/^.*node_modules\//, '')}@${version}`)
  const listed = components.map(({ name, version }) => `${name}@${version}`)
  t.strictSame(listed.sort(), [...new Set(runtime)].sort())
  for (const { name, licenses = [] } of components) {
    const [licence] = licenses.map(({ license, expression }) => expression ?? license?.id ?? license?.name)
    t.ok(licence !== undefined && allowedLicences.has(licence), `${name}: ${licence}`)
  }
})
