import { readFile } from 'node:fs/promises'
import { Deployment } from 'kubernetes-models/apps/v1/Deployment'
import { HorizontalPodAutoscaler } from 'kubernetes-models/autoscaling/v2/HorizontalPodAutoscaler'
import { PodDisruptionBudget } from 'kubernetes-models/policy/v1/PodDisruptionBudget'
import { Service } from 'kubernetes-models/v1/Service'
import t from 'tap'
import { parse, parseAllDocuments } from 'yaml'
import { loadConfig } from '../dist/config/config.js'
import { describeVariables } from '../testkit/generated-docs.js'

const read = (file: string) => readFile(new URL(`../${file}`, import.meta.url), 'utf8')

/** The names of all variables that the service reads. */
const variables = new Set(describeVariables().map(({ name }) => name))

const [deployment, service, autoscaler, budget] = parseAllDocuments(await read('deploy/kubernetes.yaml')).map(
  (document) => document.toJS()
)

t.test('the Kubernetes objects are valid against their schemas', async (t) => {
  t.doesNotThrow(() => new Deployment(deployment).validate())
  t.doesNotThrow(() => new Service(service).validate())
  t.doesNotThrow(() => new HorizontalPodAutoscaler(autoscaler).validate())
  t.doesNotThrow(() => new PodDisruptionBudget(budget).validate())
  t.throws(() => new Deployment({ ...deployment, spec: { ...deployment.spec, replicas: 'two' } }).validate())
})

t.test('a pod grants the CPU, memory and shutdown time that the service needs, and names its ports', async (t) => {
  const { spec } = deployment.spec.template
  const [container] = spec.containers
  const env = Object.fromEntries(container.env.map(({ name, value }: { name: string; value: string }) => [name, value]))
  for (const name of Object.keys(env)) t.ok(variables.has(name), name)
  const secret = 'a secret of at least thirty-two characters'
  const stores = { DATABASE_URL: 'postgresql://db/app', REDIS_URL: 'redis://cache', SESSION_SECRET: secret, SMS: 'off' }
  const config = loadConfig({ NODE_ENV: 'production', ...stores, ...env })
  const shutdownMs = config.shutdownDelayMs + config.shutdownTimeoutMs
  t.ok(spec.terminationGracePeriodSeconds * 1_000 > shutdownMs)
  const neededMib = 200 + (config.hashThreads * config.hashMemoryKib) / 1_024
  t.ok(Number.parseInt(container.resources.requests.memory, 10) > neededMib)
  t.equal(Number(container.resources.requests.cpu), config.hashThreads)
  const ports = container.ports.map(({ containerPort }: { containerPort: number }) => containerPort)
  t.strictSame(ports, [config.port, config.metricsPort])
})

t.test('Compose and the image set only variables that the service reads, and allow a graceful shutdown', async (t) => {
  const { services } = parse(await read('compose.yaml'))
  for (const name of Object.keys(services.service.environment)) t.ok(variables.has(name), name)
  t.ok(Number.parseInt(services.service.stop_grace_period, 10) > 15)
  const dockerfile = await read('Dockerfile')
  const [, env = ''] = /^ENV (.*)$/m.exec(dockerfile) ?? []
  for (const [, name = ''] of env.matchAll(/(\S+)=/g)) t.ok(variables.has(name), name)
  for (const [, command = ''] of dockerfile.matchAll(/CMD (\[.*\])$/gm)) t.equal(JSON.parse(command)[0], 'node')
})
