import { execFile } from 'node:child_process'
import { readFile } from 'node:fs/promises'
import { createServer, type RequestListener } from 'node:http'
import { Deployment } from 'kubernetes-models/apps/v1/Deployment'
import { HorizontalPodAutoscaler } from 'kubernetes-models/autoscaling/v2/HorizontalPodAutoscaler'
import { NetworkPolicy } from 'kubernetes-models/networking.k8s.io/v1/NetworkPolicy'
import { PodDisruptionBudget } from 'kubernetes-models/policy/v1/PodDisruptionBudget'
import { Service } from 'kubernetes-models/v1/Service'
import pg from 'pg'
import t from 'tap'
import { parse, parseAllDocuments } from 'yaml'
import { loadConfig } from '#src/config/config.js'
import { describeVariables } from '../testkit/generated-docs.js'
import { listen } from '../testkit/listen.js'
import { startStores } from '../testkit/private-stores.js'
import { ServerProcess } from '../testkit/server-process.js'

const read = (file: string) => readFile(new URL(`../${file}`, import.meta.url), 'utf8')

/** The names of all variables that the service reads. */
const variables = new Set(describeVariables().map(({ name }) => name))

const [deployment, service, autoscaler, budget, ingressPolicy] = parseAllDocuments(
  await read('deploy/kubernetes.yaml')
).map((document) => document.toJS())
const egressPolicy = parse(await read('deploy/network-policy.yaml'))
const { services } = parse(await read('compose.yaml'))
const dockerfile = await read('Dockerfile')

/** Returns the variables that the pod sets, without those of the Secret. */
function podEnvironment(): Record<string, string> {
  const [container] = deployment.spec.template.spec.containers
  return Object.fromEntries(container.env.map(({ name, value }: { name: string; value: string }) => [name, value]))
}

t.test('the Kubernetes objects are valid against their schemas', async (t) => {
  t.doesNotThrow(() => new Deployment(deployment).validate())
  t.doesNotThrow(() => new Service(service).validate())
  t.doesNotThrow(() => new HorizontalPodAutoscaler(autoscaler).validate())
  t.doesNotThrow(() => new PodDisruptionBudget(budget).validate())
  for (const policy of [ingressPolicy, egressPolicy]) t.doesNotThrow(() => new NetworkPolicy(policy).validate())
  t.throws(() => new Deployment({ ...deployment, spec: { ...deployment.spec, replicas: 'two' } }).validate())
})

t.test('a pod grants the CPU, memory and shutdown time that the service needs, and names its ports', async (t) => {
  const { spec } = deployment.spec.template
  const [container] = spec.containers
  const env = podEnvironment()
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

t.test('the manifests trust no network of others, and open each port to one peer', async (t) => {
  t.strictSame(podEnvironment().TRUST_PROXY, '192.0.2.0/24', 'addresses that nobody has')
  const { ports } = deployment.spec.template.spec.containers[0]
  const { policyTypes, ingress } = ingressPolicy.spec
  t.strictSame(policyTypes, ['Ingress'])
  t.strictSame(
    ingress.map(({ ports }: { ports: { port: string }[] }) => ports.map(({ port }) => port)),
    ports.map(({ name }: { name: string }) => [name])
  )
  for (const { from } of ingress) t.match(from, [{ namespaceSelector: { matchLabels: {} } }])
  t.match(services.redis.command.join(' '), /--maxmemory \d+[mg]b --maxmemory-policy noeviction/)
})

t.test(
  'the network policies are for these pods, and every connection that they allow has a peer and a port',
  async (t) => {
    const { policyTypes, egress } = egressPolicy.spec
    const { metadata } = deployment.spec.template
    for (const { spec } of [ingressPolicy, egressPolicy]) t.match(metadata.labels, spec.podSelector.matchLabels)
    t.strictSame(policyTypes, ['Egress'], 'what no rule allows is refused')
    // DNS, Postgres, Redis and the SMS webhook.
    t.equal(egress.length, 4)
    for (const { to, ports } of egress) {
      t.ok(to.length > 0 && ports.length > 0)
      for (const { ipBlock } of to) t.ok(ipBlock === undefined || ipBlock.cidr.endsWith('/32'), 'one address')
    }
  }
)

t.test('during an update of all pods, Postgres has a connection for each that they may open', async (t) => {
  const { minReadySeconds, strategy, template } = deployment.spec
  t.ok(minReadySeconds >= template.spec.terminationGracePeriodSeconds, 'not more than one former pod is still ending')
  const ending = 1
  const pods = autoscaler.spec.maxReplicas + strategy.rollingUpdate.maxSurge + ending
  // That of the circuit breaker, outside of the pool.
  const probe = 1
  const migration = 1
  // The defaults of max_connections and superuser_reserved_connections.
  t.ok(pods * (Number(podEnvironment().PG_POOL_MAX) + probe) + migration <= 100 - 3)
})

t.test('a long migration does not restart a pod, and a node drains also while pods are not ready', async (t) => {
  const [{ startupProbe, livenessProbe, readinessProbe }] = deployment.spec.template.spec.containers
  // Live is 200 during a migration, ready is not.
  for (const probe of [startupProbe, livenessProbe]) t.equal(probe.httpGet.path, '/health/live')
  t.equal(readinessProbe.httpGet.path, '/health/ready')
  t.match(budget.spec, { maxUnavailable: 1, unhealthyPodEvictionPolicy: 'AlwaysAllow' })
})

t.test('Compose and the image set only variables that the service reads, and allow a graceful shutdown', async (t) => {
  const { environment, stop_grace_period, init } = services.service
  // node-postgres reads PGPASSWORD.
  for (const name of Object.keys(environment)) t.ok(variables.has(name) || name === 'PGPASSWORD', name)
  t.ok(Number.parseInt(stop_grace_period, 10) > 15)
  t.equal(init, true, 'SIGTERM works before Node.js has started')
  const [, env = ''] = /^ENV (.*)$/m.exec(dockerfile) ?? []
  for (const [, name = ''] of env.matchAll(/(\S+)=/g)) t.ok(variables.has(name), name)
  for (const [, command = ''] of dockerfile.matchAll(/CMD (\[.*\])$/gm)) t.equal(JSON.parse(command)[0], 'node')
})

t.test('with Compose, .env sets every variable but those of the port mapping', async (t) => {
  const { environment, env_file, ports } = services.service
  t.strictSame(env_file, [{ path: '.env', required: false }])
  const overrides = Object.entries(environment).filter(([name, value]) => !`${value}`.startsWith(`\${${name}:-`))
  t.strictSame(overrides.map(([name]) => name).sort(), ['HOST', 'PGPASSWORD', 'PORT'])
  t.strictSame(ports, [`127.0.0.1:\${PORT:-3000}:${environment.PORT}`])
})

t.test('with Compose, POSTGRES_PASSWORD may contain any character', async (t) => {
  const stores = await startStores()
  t.teardown(() => stores.stop())
  const password = 'p@ss/w:rd?#%41&=+ \\"'
  await stores.postgres.query(`ALTER ROLE postgres PASSWORD ${pg.escapeLiteral(password)}`)
  const { environment } = services.service
  t.equal(environment.PGPASSWORD, services.postgres.environment.POSTGRES_PASSWORD)
  const [, url = ''] = /^\$\{DATABASE_URL:-(.*)\}$/.exec(environment.DATABASE_URL) ?? []
  const databaseUrl = new URL(url)
  databaseUrl.host = new URL(stores.databaseUrl).host
  const service = ServerProcess.start(undefined, {
    env: { ...stores.environment, DATABASE_URL: databaseUrl.href, PGPASSWORD: password }
  })
  t.teardown(() => service.dispose())
  t.match(await service.url(), /^http:/)
  t.equal(await service.stop(), 0)
})

/** Runs the command of the HEALTHCHECK. */
function probe(env: Record<string, string>): Promise<{ code: unknown; stdout: string }> {
  const [, command = ''] = /^HEALTHCHECK [^[]*CMD (\[.*\])$/m.exec(dockerfile) ?? []
  return new Promise((resolve) => {
    execFile(process.execPath, JSON.parse(command).slice(1), { env, timeout: 20_000 }, (error, stdout) =>
      resolve({ code: error ? error.code : 0, stdout })
    )
  })
}

t.test('HEALTHCHECK passes for a live service, and fails by itself for one that hangs', async (t) => {
  const codeFor = async (listener: RequestListener) => {
    const url = await listen(t, createServer(listener))
    return (await probe({ PORT: new URL(url).port })).code
  }
  t.equal(await codeFor(({ url }, response) => response.writeHead(url === '/health/live' ? 200 : 404).end()), 0)
  t.equal(await codeFor((_, response) => response.writeHead(503).end()), 1)
  t.equal(await codeFor(() => undefined), 1, 'no timeout of the engine is needed')
})

t.test('HEALTHCHECK asks the default port if PORT is empty, as the service does', async (t) => {
  const printUrl = 'globalThis.fetch = async (url) => (console.log(url), { ok: true })'
  const { code, stdout } = await probe({
    PORT: '',
    NODE_OPTIONS: `--import="data:text/javascript,${encodeURIComponent(printUrl)}"`
  })
  t.equal(code, 0)
  t.equal(new URL(stdout).port, `${describeVariables().find(({ name }) => name === 'PORT')?.shownDefault}`)
})
