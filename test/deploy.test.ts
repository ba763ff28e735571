import { execFileSync } from 'node:child_process'
import { once } from 'node:events'
import { chmod, readFile, writeFile } from 'node:fs/promises'
import { createServer, type RequestListener } from 'node:http'
import { Agent, request } from 'node:https'
import { basename, join } from 'node:path'
import { text } from 'node:stream/consumers'
import { setTimeout as sleep } from 'node:timers/promises'
import { Deployment } from 'kubernetes-models/apps/v1/Deployment'
import { HorizontalPodAutoscaler } from 'kubernetes-models/autoscaling/v2/HorizontalPodAutoscaler'
import { NetworkPolicy } from 'kubernetes-models/networking.k8s.io/v1/NetworkPolicy'
import { PodDisruptionBudget } from 'kubernetes-models/policy/v1/PodDisruptionBudget'
import { Service } from 'kubernetes-models/v1/Service'
import pg from 'pg'
import t, { type Test } from 'tap'
import { parse, parseAllDocuments } from 'yaml'
import { loadConfig } from '#src/config/config.js'
import { freePort } from '../dev/embedded-stores.js'
import { GuardedServer } from '../dev/guarded-server.js'
import { findProgram } from '../dev/programs.js'
import { describeVariables } from '../testkit/generated-docs.js'
import { listen } from '../testkit/listen.js'
import { type ExitResult, runNode } from '../testkit/run-node.js'
import { temporaryFolderFor } from '../testkit/temporary-folder.js'
import { type SignUpBody, startTestbed } from '../testkit/testbed.js'
import { until } from '../testkit/until.js'

/*
 * The files that operators copy: deploy/, compose.yaml and the Dockerfile.
 */

const { build, startService, signUpBody, holdInserts, ageClaim, userRows, postgres, stores } = await startTestbed(t)

const read = (file: string) => readFile(new URL(`../${file}`, import.meta.url), 'utf8')

/** The names of all variables that the service reads. */
const variables = new Set(describeVariables().map(({ name }) => name))

const [deployment, service, autoscaler, budget, ingressPolicy] = parseAllDocuments(
  await read('deploy/kubernetes.yaml')
).map((document) => document.toJS())
const egressPolicy = parse(await read('deploy/network-policy.yaml'))
const { services } = parse(await read('compose.yaml'))
const dockerfile = await read('Dockerfile')

const { template, strategy, minReadySeconds } = deployment.spec
const [container] = template.spec.containers
/** The variables that the pod sets, without those of the Secret. */
const podEnvironment: Record<string, string> = Object.fromEntries(
  container.env.map(({ name, value }: { name: string; value: string }) => [name, value])
)

t.test('the Kubernetes objects are valid against their schemas', async (t) => {
  t.doesNotThrow(() => new Deployment(deployment).validate())
  t.doesNotThrow(() => new Service(service).validate())
  t.doesNotThrow(() => new HorizontalPodAutoscaler(autoscaler).validate())
  t.doesNotThrow(() => new PodDisruptionBudget(budget).validate())
  for (const policy of [ingressPolicy, egressPolicy]) t.doesNotThrow(() => new NetworkPolicy(policy).validate())
})

t.test('a pod grants the CPU, memory and shutdown time that the service needs, and names its ports', async (t) => {
  const secrets = { DATABASE_URL: 'postgresql://db/app', REDIS_URL: 'redis://cache', SESSION_SECRET: 's'.repeat(32) }
  const config = loadConfig({ NODE_ENV: 'production', SMS: 'off', ...secrets, ...podEnvironment })
  t.ok(template.spec.terminationGracePeriodSeconds * 1_000 > config.shutdownDelayMs + config.shutdownTimeoutMs)
  const neededMib = 200 + (config.hashThreads * config.hashMemoryKib) / 1_024
  t.ok(Number.parseInt(container.resources.requests.memory, 10) > neededMib)
  t.equal(Number(container.resources.requests.cpu), config.hashThreads)
  const ports = container.ports.map(({ containerPort }: { containerPort: number }) => containerPort)
  t.strictSame(ports, [config.port, config.metricsPort])
})

t.test('the manifests trust no network of others, and open each connection to one peer and port', async (t) => {
  t.strictSame(podEnvironment.TRUST_PROXY, '192.0.2.0/24', 'addresses that nobody has')
  for (const { spec } of [ingressPolicy, egressPolicy]) t.match(template.metadata.labels, spec.podSelector.matchLabels)
  const { ingress } = ingressPolicy.spec
  const { egress } = egressPolicy.spec
  const policyTypes = [ingressPolicy, egressPolicy].flatMap(({ spec }) => spec.policyTypes)
  t.strictSame(policyTypes, ['Ingress', 'Egress'])
  const portNames: string[] = container.ports.map(({ name }: { name: string }) => name)
  t.match(
    ingress,
    portNames.map((port) => ({ ports: [{ port }] }))
  )
  for (const { from } of ingress) t.match(from, [{ namespaceSelector: { matchLabels: {} } }])
  // DNS, Postgres, Redis and the SMS webhook.
  t.equal(egress.length, 4)
  for (const { to, ports } of egress) {
    t.ok(to.length > 0 && ports.length > 0)
    for (const { ipBlock } of to) t.ok(ipBlock === undefined || ipBlock.cidr.endsWith('/32'), 'one address')
  }
  t.match(services.redis.command.join(' '), /--maxmemory \d+[mg]b --maxmemory-policy noeviction/)
})

t.test('during an update of all pods, Postgres has a connection for each that they may open', async (t) => {
  t.ok(minReadySeconds >= template.spec.terminationGracePeriodSeconds, 'not more than one former pod is still ending')
  const ending = 1
  const pods = autoscaler.spec.maxReplicas + strategy.rollingUpdate.maxSurge + ending
  // That of the circuit breaker, outside of the pool, and that of the migration.
  const [probe, migration] = [1, 1]
  // The defaults of max_connections and superuser_reserved_connections.
  t.ok(pods * (Number(podEnvironment.PG_POOL_MAX) + probe) + migration <= 100 - 3)
})

t.test('a long migration does not restart a pod, and a node drains also while pods are not ready', async (t) => {
  const { startupProbe, livenessProbe, readinessProbe } = container
  // Live is 200 during a migration, ready is not.
  for (const probe of [startupProbe, livenessProbe]) t.equal(probe.httpGet.path, '/health/live')
  t.equal(readinessProbe.httpGet.path, '/health/ready')
  t.match(budget.spec, { maxUnavailable: 1, unhealthyPodEvictionPolicy: 'AlwaysAllow' })
})

t.test('the manifests set only variables that the service reads; Compose lets .env set them', async (t) => {
  const { environment, env_file, ports, stop_grace_period, init } = services.service
  const [, env = ''] = /^ENV (.*)$/m.exec(dockerfile) ?? []
  const ofImage = [...env.matchAll(/(\S+)=/g)].map(([, name = '']) => name)
  // node-postgres reads PGPASSWORD.
  for (const name of [...Object.keys({ ...podEnvironment, ...environment }), ...ofImage])
    t.ok(variables.has(name) || name === 'PGPASSWORD', name)
  t.strictSame(env_file, [{ path: '.env', required: false }])
  const overrides = Object.entries(environment).filter(([name, value]) => !`${value}`.startsWith(`\${${name}:-`))
  t.strictSame(overrides.map(([name]) => name).sort(), ['HOST', 'PGPASSWORD', 'PORT'])
  t.strictSame(ports, [`127.0.0.1:\${PORT:-3000}:${environment.PORT}`])
  t.ok(Number.parseInt(stop_grace_period, 10) > 15, 'a graceful shutdown')
  t.equal(init, true, 'SIGTERM works before Node.js has started')
  for (const [, command = ''] of dockerfile.matchAll(/CMD (\[.*\])$/gm)) t.equal(JSON.parse(command)[0], 'node')
})

t.test('with Compose, POSTGRES_PASSWORD may contain any character', async (t) => {
  const password = 'p@ss/w:rd?#%41&=+ \\"'
  await postgres.query(`CREATE ROLE compose LOGIN SUPERUSER PASSWORD ${pg.escapeLiteral(password)}`)
  const { environment } = services.service
  t.equal(environment.PGPASSWORD, services.postgres.environment.POSTGRES_PASSWORD)
  const [, url = ''] = /^\$\{DATABASE_URL:-(.*)\}$/.exec(environment.DATABASE_URL) ?? []
  const DATABASE_URL = Object.assign(new URL(url), { host: new URL(stores.databaseUrl).host, username: 'compose' }).href
  t.intercept(process, 'env', { value: { ...process.env, PGPASSWORD: password } })
  await t.resolves(build(t, { DATABASE_URL }))
})

/** Runs the command of the HEALTHCHECK. */
function probe(env: Record<string, string>): Promise<ExitResult> {
  const [, command = ''] = /^HEALTHCHECK [^[]*CMD (\[.*\])$/m.exec(dockerfile) ?? []
  return runNode(JSON.parse(command).slice(1), env)
}

t.test('HEALTHCHECK passes for a live service, fails by itself for one that hangs, and knows PORT', async (t) => {
  const codeFor = async (listener: RequestListener) => {
    const url = await listen(t, createServer(listener))
    return (await probe({ PORT: new URL(url).port })).code
  }
  const codes = await Promise.all([
    codeFor(({ url }, response) => response.writeHead(url === '/health/live' ? 200 : 404).end()),
    codeFor((_, response) => response.writeHead(503).end()),
    codeFor(() => undefined)
  ])
  t.strictSame(codes, [0, 1, 1], 'no timeout of the engine is needed')
  const printUrl = 'globalThis.fetch = async (url) => (console.log(url), { ok: true })'
  const NODE_OPTIONS = `--import="data:text/javascript,${encodeURIComponent(printUrl)}"`
  const { stdout } = await probe({ PORT: '', NODE_OPTIONS })
  t.equal(new URL(stdout).port, `${describeVariables().find(({ name }) => name === 'PORT')?.shownDefault}`)
})

const directory = temporaryFolderFor(t)
// The workers of nginx do not run as root.
await chmod(directory, 0o755)
const file = (name: string) => join(directory, name)
const subject = ['-x509', '-days', '1', '-subj', '/CN=localhost', '-addext', 'subjectAltName=IP:127.0.0.1']
const newKey = ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes', '-keyout', file('gateway.key')]
execFileSync('openssl', ['req', ...subject, ...newKey, '-out', file('gateway.crt')], { stdio: 'ignore' })
const ca = await readFile(file('gateway.crt'), 'utf8')
await writeFile(file('gateway.pem'), ca + (await readFile(file('gateway.key'), 'utf8')))

const temporaryPaths = ['client_body', 'proxy', 'fastcgi', 'uwsgi', 'scgi'].map(
  (name) => `${name}_temp_path ${file('temp')};`
)

/** How each gateway is started. Its configuration is that of deploy/, with other addresses, files and rates. */
const gateways = {
  nginx: {
    changes: (port: number): [RegExp, string][] => [
      [/listen \[.*\n/, ''],
      [/listen 443/, `listen 127.0.0.1:${port}`],
      [/\S+\/mobile-signup\.(log|crt|key)/g, file('gateway.$1')],
      [/rate=\d+/, 'rate=100000'],
      [/http \{/, `http { ${temporaryPaths.join(' ')}`]
    ],
    start: ['-e', 'stderr', '-g', `daemon off; pid ${file('pid')};`, '-c', file('nginx.conf')],
    check: '-t'
  },
  haproxy: {
    changes: (port: number): [RegExp, string][] => [
      [/bind :::443 v4v6/, `bind 127.0.0.1:${port}`],
      [/\S+\/mobile-signup\.pem/, file('gateway.pem')],
      [/gt \d+/, 'gt 100000']
    ],
    start: ['-f', file('haproxy.cfg')],
    check: '-c'
  }
}

/** Returns the command of a gateway in front of two ports, when it has checked its configuration. */
async function prepare(name: keyof typeof gateways, port: number, ports: readonly [number, number]) {
  const { changes, start, check } = gateways[name]
  const command = [findProgram(name) ?? `/usr/sbin/${name}`, ...start]
  const configFile = basename(`${start.at(-1)}`)
  let config = await read(`deploy/${configFile}`)
  for (const [pattern, text] of [
    ...changes(port),
    [/127\.0\.0\.1:3001/, `127.0.0.1:${ports[0]}`],
    [/127\.0\.0\.1:3002/, `127.0.0.1:${ports[1]}`]
  ] as const) {
    const changed = config.replace(pattern, text)
    if (changed === config) throw new Error(`${configFile} has no ${pattern}`)
    config = changed
  }
  await writeFile(file(configFile), config)
  execFileSync(`${command[0]}`, [...start, check], { stdio: 'pipe' })
  return command
}

async function startNginx(t: Test, ports: readonly [number, number]) {
  const port = await freePort()
  const command = await prepare('nginx', port, ports)
  const server = GuardedServer.spawn('nginx', { command, identity: {} }, file('output'))
  t.teardown(() => server.stop())
  const agent = new Agent({ keepAlive: true, ca })
  t.teardown(() => agent.destroy())
  /** @returns the status, 0 if there is no answer, and the headers and the body */
  async function send(path: string, body?: object, more: Record<string, string> = {}) {
    const headers = { 'content-type': 'application/json', ...more }
    const sent = request({ port, host: '127.0.0.1', path, agent, method: body ? 'POST' : 'GET', headers })
    sent.end(body && JSON.stringify(body))
    try {
      const [response] = await once(sent, 'response')
      return { status: response.statusCode, headers: response.headers, body: await text(response) }
    } catch (error) {
      return { status: 0, headers: {}, body: `${error}` }
    }
  }
  await until('nginx and both instances serve', async () => {
    const replies = await Promise.all([1, 2, 3, 4].map(() => send('/api/v1.0/session')))
    return replies.every(({ status }) => status === 401)
  })
  return { send, signUp: (body: SignUpBody) => send('/api/v1.0/users', body) }
}

t.test('nginx: a restart of an instance under load costs no sign-up, and its kill no code (G4)', async (t) => {
  const ports = [await freePort(), await freePort()] as const
  const start = (port: number) => startService(t, { PORT: `${port}`, TRUST_PROXY: '127.0.0.1' })
  const [restarted, killed] = [start(ports[0]), start(ports[1])]
  await Promise.all([restarted.url(), killed.url()])
  const { send, signUp } = await startNginx(t, ports)

  const statuses: Record<string, number> = {}
  let isOver = false
  const load = Array.from({ length: 3 }, async () => {
    while (!isOver) {
      const { status, body } = await signUp(await signUpBody())
      const what = status === 201 ? '201' : `${status} ${body}`
      statuses[what] = (statuses[what] ?? 0) + 1
      await sleep(40)
    }
  })
  const untilMore = () => {
    const count = statuses['201'] ?? 0
    return until('more sign-ups', () => (statuses['201'] ?? 0) > count + 20)
  }
  await untilMore()
  t.equal(await restarted.stop(), 0)
  await untilMore()
  await start(ports[0]).url()
  await untilMore()
  isOver = true
  await Promise.all(load)
  t.strictSame(Object.keys(statuses), ['201'])

  const hidden = await send('/health/ready')
  t.strictSame([hidden.status, hidden.body], [404, '{"errno":"4201","errmsg":"非法请求"}'])
  const reply = await send('/api/v1.0/session', undefined, { 'x-forwarded-for': '10.9.8.7', 'x-request-id': 'mine' })
  t.match(reply.headers['strict-transport-security'], 'max-age=31536000')
  t.match(reply.headers['x-request-id'], /^[0-9a-f-]{32,36}$/)

  // All requests of one instance are in flight when it is killed.
  const inserts = await holdInserts(t)
  const bodies = await Promise.all(Array.from({ length: 6 }, () => signUpBody()))
  const inFlight = bodies.map((body) => signUp(body))
  await inserts.arrived(bodies.length)
  killed.kill('SIGKILL')
  await killed.exit
  await inserts.release()
  const first = await Promise.all(inFlight)
  t.ok(first.filter(({ status }) => status === 201).length >= 2, 'the other instance answers its own')
  for (const [index, { status, body }] of first.entries()) {
    const signUpOf = bodies[index]
    if (status === 201 || signUpOf === undefined) continue
    t.equal(status, 503, body)
    // The lease of the dead instance expires.
    await ageClaim(signUpOf.mobile, 600_000)
    t.equal((await signUp(signUpOf)).status, 201)
  }
  for (const { mobile } of bodies) t.equal((await userRows(mobile)).length, 1)
})

t.test('HAProxy accepts its configuration in deploy/', async (t) => {
  await t.resolves(prepare('haproxy', 8443, [3003, 3004]))
})
