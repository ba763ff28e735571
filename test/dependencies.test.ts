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
}

const { stdout } = await promisify(execFile)('npm', ['run', '--silent', 'sbom'], { maxBuffer: 2 ** 24 })
const sbom: { bomFormat: string; components: Component[] } = JSON.parse(stdout)
const { packages }: { packages: Record<string, LockedPackage> } = JSON.parse(
  await readFile(new URL('../package-lock.json', import.meta.url), 'utf8')
)

t.test(
  'the bill of materials is a CycloneDX file with every runtime dependency, and none for development',
  async (t) => {
    t.equal(sbom.bomFormat, 'CycloneDX')
    const listed = sbom.components.map(({ name, version }) => `${name}@${version}`)
    const runtime = Object.entries(packages)
      .filter(([path, { dev }]) => path !== '' && !dev)
      .map(([path, { version }]) => `${path.replace(/^.*node_modules\//, '')}@${version}`)
    t.ok(runtime.length > 100)
    t.strictSame(listed.sort(), [...new Set(runtime)].sort())
  }
)

t.test('every runtime dependency has a licence of the allow list', async (t) => {
  for (const { name, licenses = [] } of sbom.components) {
    const [licence] = licenses.map(({ license, expression }) => expression ?? license?.id ?? license?.name)
    t.ok(licence !== undefined && allowedLicences.has(licence), `${name}: ${licence}`)
  }
})
