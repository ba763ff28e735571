import { execFileSync } from 'node:child_process'
import { chmod, readFile, rm, writeFile } from 'node:fs/promises'
import { Agent, request } from 'node:https'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import t, { type Test } from 'tap'
import { freePort } from '../dev/embedded-stores.js'
import { GuardedServer } from '../dev/guarded-server.js'
import { findProgram } from '../dev/programs.js'
import { createTemporaryFolder } from '../testkit/temporary-folder.js'
import { type SignUpBody, startTestbed } from '../testkit/testbed.js'
import { until } from '../testkit/until.js'

const { startService, signUpBody, holdInserts, ageClaim, userRows } = await startTestbed(t)

const directory = createTemporaryFolder()
t.teardown(() => rm(directory, { recursive: true }))
// The workers of nginx do not run as root.
await chmod(directory, 0o755)
const [certificate, key, both] = ['crt', 'key', 'pem'].map((suffix) => join(directory, `gateway.${suffix}`)) as [
  string,
  string,
  string
]
execFileSync(
  'openssl',
  [
    'req',
    '-x509',
    '-newkey',
    'ec',
    '-pkeyopt',
    'ec_paramgen_curve:prime256v1',
    '-nodes',
    '-days',
    '1',
    '-subj',
    '/CN=localhost'
  ].concat(['-addext', 'subjectAltName=IP:127.0.0.1', '-keyout', key, '-out', certificate]),
  { stdio: 'ignore' }
)
const ca = await readFile(certificate, 'utf8')
await writeFile(both, ca + (await readFile(key, 'utf8')))

/** How each gateway is started. Its configuration is that of deploy/, with other addresses, files and rates. */
const gateways = {
  nginx: {
    file: 'nginx.conf',
    changes: (port: number): [RegExp, string][] => [
      [/listen \[.*\n/, ''],
      [/listen 443/, `listen 127.0.0.1:${port}`],
      [/\S+\/mobile-signup\.(log|crt|key)/g, `${directory}/gateway.$1`],
      [/rate=\d+/, 'rate=100000'],
      [
        /http \{/,
        `http {\n${['client_body', 'proxy', 'fastcgi', 'uwsgi', 'scgi'].map((name) => `${name}_temp_path ${directory}/temp;`).join('\n')}`
      ]
    ],
    arguments: (config: string) => ['-c', config, '-e', 'stderr', '-g', `daemon off; pid ${directory}/pid;`],
    check: '-t'
  },
  haproxy: {
    file: 'haproxy.cfg',
    changes: (port: number): [RegExp, string][] => [
      [/bind :::443 v4v6/, `bind 127.0.0.1:${port}`],
      [/\S+\/mobile-signup\.pem/, both],
      [/gt \d+/, 'gt 100000']
    ],
    arguments: (config: string) => ['-f', config],
    check: '-c'
  }
}

/** Returns the command of a gateway in front of two ports, when it has checked its configuration. */
async function prepare(name: keyof typeof gateways, port: number, ports: readonly [number, number]) {
  const gateway = gateways[name]
  const program = findProgram(name) ?? `/usr/sbin/${name}`
  let config = await readFile(new URL(`../deploy/${gateway.file}`, import.meta.url), 'utf8')
  for (const [pattern, text] of [
    ...gateway.changes(port),
    [/127\.0\.0\.1:3001/, `127.0.0.1:${ports[0]}`],
    [/127\.0\.0\.1:3002/, `127.0.0.1:${ports[1]}`]
  ] as const) {
    const changed = config.replace(pattern, text)
    if (changed === config) throw new Error(`${gateway.file} has no ${pattern}`)
    config = changed
  }
  const file = join(directory, gateway.file)
  await writeFile(file, config)
  const command = [program, ...gateway.arguments(file)]
  execFileSync(program, [...gateway.arguments(file), gateway.check], { stdio: 'pipe' })
  return command
}

/** Starts nginx in front of two ports. */
async function startNginx(t: Test, ports: readonly [number, number]) {
  const port = await freePort()
  const command = await prepare('nginx', port, ports)
  const server = GuardedServer.spawn('nginx', { command, identity: {} }, join(directory, 'output'))
  t.teardown(() => server.stop())
  const agent = new Agent({ keepAlive: true, ca })
  t.teardown(() => agent.destroy())
  /** @returns the status, 0 if there is no answer, and the headers and the body */
  function send(path: string, body?: object, headers: Record<string, string> = {}) {
    return new Promise<{ status: number; headers: Record<string, unknown>; body: string }>((resolve) => {
      const type = { 'content-type': 'application/json', ...headers }
      const options = { port, host: '127.0.0.1', path, agent, method: body ? 'POST' : 'GET', headers: type }
      const sent = request(options, async (response) => {
        let text = ''
        for await (const chunk of response) text += chunk
        resolve({ status: response.statusCode ?? 0, headers: response.headers, body: text })
      })
      sent.on('error', (error) => resolve({ status: 0, headers: {}, body: error.message }))
      sent.end(body && JSON.stringify(body))
    })
  }
  await until('nginx and both instances serve', async () => {
    const replies = await Promise.all([1, 2, 3, 4].map(() => send('/api/v1.0/session')))
    return replies.every(({ status }) => status === 401)
  })
  return { send, signUp: (body: SignUpBody) => send('/api/v1.0/users', body) }
}

t.test('nginx as in deploy/: a restart of two instances in turn under load costs no sign-up', async (t) => {
  const ports = [await freePort(), await freePort()] as const
  const start = (port: number) => startService(t, { PORT: `${port}`, TRUST_PROXY: '127.0.0.1' })
  const services = ports.map(start)
  await Promise.all(services.map((service) => service.url()))
  const { send, signUp } = await startNginx(t, ports)

  const statuses: Record<string, number> = {}
  let isOver = false
  const load = Array.from({ length: 4 }, async () => {
    while (!isOver) {
      const { status, body } = await signUp(await signUpBody())
      const what = status === 201 ? '201' : `${status} ${body}`
      statuses[what] = (statuses[what] ?? 0) + 1
      await sleep(20)
    }
  })
  const untilMore = () => {
    const count = statuses['201'] ?? 0
    return until('more sign-ups', () => (statuses['201'] ?? 0) > count + 20)
  }
  await untilMore()
  for (const [index, port] of ports.entries()) {
    t.equal(await services[index]?.stop(), 0)
    await untilMore()
    services[index] = start(port)
    await services[index]?.url()
    await untilMore()
  }
  isOver = true
  await Promise.all(load)
  t.strictSame(Object.keys(statuses), ['201'])

  const hidden = await send('/health/ready')
  t.strictSame([hidden.status, hidden.body], [404, '{"errno":"4201","errmsg":"非法请求"}'])
  const reply = await send('/api/v1.0/session', undefined, { 'x-forwarded-for': '10.9.8.7', 'x-request-id': 'mine' })
  t.match(reply.headers['strict-transport-security'], 'max-age=31536000')
  t.match(reply.headers['x-request-id'], /^[0-9a-f-]{32,36}$/)

  // All of one instance's requests are in flight when it is killed.
  const inserts = await holdInserts(t)
  const bodies = await Promise.all(Array.from({ length: 6 }, () => signUpBody()))
  const inFlight = bodies.map((body) => signUp(body))
  await inserts.arrived(bodies.length)
  services[0]?.kill('SIGKILL')
  await services[0]?.exit
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
