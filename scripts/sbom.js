/*
 * npm run --silent sbom: prints a software bill of materials, with every dependency of the service, as CycloneDX.
 *
 * Not with `npm sbom --omit=dev`: npm 11 then also omits what a development dependency needs, too, such as pg.
 */
import { execFileSync } from 'node:child_process'

const developmentProperty = 'cdx:npm:package:development'

const options = ['--package-lock-only', '--sbom-format=cyclonedx', '--sbom-type=application']
const sbom = JSON.parse(execFileSync('npm', ['sbom', ...options], { encoding: 'utf8', maxBuffer: 2 ** 26 }))

sbom.components = sbom.components.filter(
  ({ properties }) => !properties.some(({ name }) => name === developmentProperty)
)
const refs = new Set([sbom.metadata.component['bom-ref'], ...sbom.components.map((component) => component['bom-ref'])])
sbom.dependencies = sbom.dependencies
  .filter(({ ref }) => refs.has(ref))
  .map(({ ref, dependsOn }) => ({ ref, dependsOn: dependsOn.filter((target) => refs.has(target)) }))

process.stdout.write(`${JSON.stringify(sbom, null, 2)}\n`)
