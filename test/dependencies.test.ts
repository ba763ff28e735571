import { execFile } from 'node:child_process'
import { readFile } from 'node:fs/promises'
import { promisify } from 'node:util'
import t from 'tap'

/** Licences that let anybody run, change and pass on the service, also as part of a closed product. */
const allowedLicences = new Set(['Apache-2.0', 'BSD-2-Clause', 'BSD-3-Clause', 'BlueOak-1.0.0', 'ISC', 'MIT'])

interface Component {
  name: string
  version: string
  licenses?: { license?: { id?: string; name?: string }; expression?: string }[]
}

interface LockedPackage {
  version: string
  dev?: boolean
  optional?: boolean
}

const { stdout } = await promisify(execFile)('npm', ['run', '--silent', 'sbom'], { maxBuffer: 2 ** 24 })
const sbom: { bomFormat: string; components: Component[] } = JSON.parse(stdout)
const { packages }: { packages: Record<string, LockedPackage> } = JSON.parse(
  await readFile(new URL('../package-lock.json', import.meta.url), 'utf8')
)

const installed = new Set(sbom.components.map(({ name, version }) => `${name}@${version}`))
/** The dependencies that are not only for development, by `name@version`. */
const locked = new Map(
  Object.entries(packages)
    .filter(([path, { dev }]) => path !== '' && !dev)
    .map(([path, { version, optional }]) => [`${path.replace(/^.*node_modules\//, '')}@${version}`, { optional }])
)

t.test('the bill of materials is a CycloneDX file with every runtime dependency, and none for development', async (t) => {
  t.equal(sbom.bomFormat, 'CycloneDX')
  for (const component of installed) t.ok(locked.has(component), component)
  // Optional ones are binaries for other systems.
  for (const [component, { optional }] of locked) t.ok(optional || installed.has(component), component)
})

t.test('every runtime dependency has a licence of the allow list', async (t) => {
  for (const { name, licenses = [] } of sbom.components) {
    const [licence] = licenses.map(({ license, expression }) => expression ?? license?.id ?? license?.name)
    t.ok(licence !== undefined && allowedLicences.has(licence), `${name}: ${licence}`)
  }
})
