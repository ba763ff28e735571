import { execFileSync } from 'node:child_process'
import { chownSync } from 'node:fs'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import t, { type Test } from 'tap'
import { isRoot, unprivilegedId } from '../src/dev/guarded-server.js'
import { freePort } from '../src/dev/stores.js'
import { build, post, postgres, signUpBody, stores } from './helper.js'
import { password, startRedis } from './redis-servers.js'
import { named, said, start } from './service.js'

const directory = await mkdtemp(join(tmpdir(), 'mobile-signup-tls-'))
t.teardown(() => rm(directory, { recursive: true }))
if (isRoot) chownSync(directory, unprivilegedId, unprivilegedId)

/** A certificate of a CA of ours, or with none a CA. Returns the paths of the certificate and of its key. */
function certificate(name: string, ca?: { certificate: string; key: string }, hosts = '') {
  const paths = { certificate: join(directory, `${name}.crt`), key: join(directory, `${name}.key`) }
  const signature = ca ? ['-CA', ca.certificate, '-CAkey', ca.key, '-addext', `subjectAltName=${hosts}`] : []
  const key = ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes', '-keyout', paths.key]
  const subject = ['-x509', '-days', '1', '-subj', `/CN=${name}`]
  execFileSync('openssl', ['req', ...subject, ...key, '-out', paths.certificate, ...signature], { stdio: 'ignore' })
  // Postgres reads its key as nobody, and wants nobody else to.
  if (isRoot) chownSync(paths.key, unprivilegedId, unprivilegedId)
  return paths
}

const ca = certificate('ca')
const ours = certificate('server', ca, 'DNS:localhost,IP:127.0.0.1')
const elsewhere = certificate('elsewhere', ca, 'DNS:elsewhere.example')
const otherCa = certificate('other-ca')

/** Lets Postgres speak TLS to those who ask for it. */
async function encryptPostgres(server: { certificate: string; key: string }) {
  await postgres.query(`ALTER SYSTEM SET ssl_cert_file = '${server.certificate}'`)
  await postgres.query(`ALTER SYSTEM SET ssl_key_file = '${server.key}'`)
  await postgres.query('ALTER SYSTEM SET ssl = on')
  await postgres.query('SELECT pg_reload_conf()')
}

/** A Redis that speaks TLS on a port of its own. */
async function encryptedRedis(t: Test, server: { certificate: string; key: string }) {
  const port = await freePort()
  const { admin } = await startRedis(t, [
    `tls-port ${port}`,
    `tls-cert-file ${server.certificate}`,
    `tls-key-file ${server.key}`,
    'tls-auth-clients no'
  ])
  return { admin, url: `rediss://:${encodeURIComponent(password)}@127.0.0.1:${port}/0` }
}

const plain = new URL(stores.databaseUrl)
plain.username = 'gate:keeper'
plain.password = encodeURIComponent(password)
const verified = `${plain.href.replace('127.0.0.1', 'localhost')}?sslmode=verify-full`
await postgres.query(`CREATE ROLE "gate:keeper" LOGIN SUPERUSER PASSWORD '${password}'`)

t.test('no TLS where it is asked for: the service does not start', async (t) => {
  const runs = {
    'Postgres does not answer: The server does not support SSL connections': { DATABASE_URL: verified },
    'Redis does not answer: ': { REDIS_URL: stores.redisUrl.replace('redis:', 'rediss:') }
  }
  await refuse(t, runs)
})

t.test('both stores by TLS, verified, with credentials that are percent-encoded', async (t) => {
  await encryptPostgres(ours)
  const redis = await encryptedRedis(t, ours)
  const env = { ...named, DATABASE_URL: verified, PGSSLROOTCERT: ca.certificate, REDIS_URL: redis.url }
  const run = start(t, { ...env, NODE_EXTRA_CA_CERTS: ca.certificate })
  const [, url] = await said(run, /Server listening at (http:[^"]+)/)
  const body = await signUpBody()
  await redis.admin.set(`sms_code_${body.mobile}`, body.sms_code)
  const reply = await fetch(`${url}/api/v1.0/users`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify(body)
  })
  t.equal(reply.status, 201)
  const { rows } = await postgres.query(
    `SELECT DISTINCT ssl FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE application_name = 'mobile-signup'`
  )
  t.strictSame(rows, [{ ssl: true }])
})

t.test('PGSSLROOTCERT counts only where the URL asks for TLS', async (t) => {
  const app = await build(t, { DATABASE_URL: plain.href, PGSSLROOTCERT: ca.certificate })
  t.equal((await post(app, await signUpBody())).statusCode, 201)
})

t.test('a certificate of another CA, or for another host: the service does not start', async (t) => {
  const redis = await encryptedRedis(t, ours)
  await refuse(t, {
    'Postgres does not answer: ': { DATABASE_URL: verified, PGSSLROOTCERT: otherCa.certificate },
    'Redis does not answer: ': { REDIS_URL: redis.url, NODE_EXTRA_CA_CERTS: otherCa.certificate }
  })
  await encryptPostgres(elsewhere)
  const redisElsewhere = await encryptedRedis(t, elsewhere)
  await refuse(t, {
    'Postgres does not answer: Hostname/IP does not match': { DATABASE_URL: verified, PGSSLROOTCERT: ca.certificate },
    'Redis does not answer: Hostname/IP does not match': {
      REDIS_URL: redisElsewhere.url,
      NODE_EXTRA_CA_CERTS: ca.certificate
    }
  })
})

/** Runs the service in some environments, and holds it to one line, with no password, and exit code 1. */
async function refuse(t: Test, runs: Record<string, Record<string, string>>) {
  const ends = Object.entries(runs).map(async ([words, env]) => {
    const run = start(t, { ...named, ...env })
    t.strictSame(await run.exit, [1, null])
    t.ok(run.output.stderr.startsWith(`mobile-signup: ${words}`), run.output.stderr)
    t.equal(run.output.stderr.trim().split('\n').length, 1)
    for (const secret of [password, encodeURIComponent(password), stores.databaseUrl]) {
      t.notOk((run.output.stderr + run.output.stdout).includes(secret))
    }
  })
  await Promise.all(ends)
}
