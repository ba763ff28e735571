import { execFileSync } from 'node:child_process'
import { chownSync } from 'node:fs'
import { copyFile, mkdir, rm } from 'node:fs/promises'
import { join } from 'node:path'
import type pg from 'pg'
import t, { type Test } from 'tap'
import type { Environment } from '#src/config/config.js'
import { freePort } from '../dev/embedded-stores.js'
import { isRoot, unprivilegedId } from '../dev/guarded-server.js'
import { client } from '../testkit/client.js'
import { startStores } from '../testkit/private-stores.js'
import { password, startRedis } from '../testkit/redis-topologies.js'
import { createTemporaryFolder } from '../testkit/temporary-folder.js'
import { startTestbed } from '../testkit/testbed.js'
import { until } from '../testkit/until.js'

const { stores, postgres, build, startService, signUpBody } = await startTestbed(t)

// A service that cannot connect waits for 10 s, so all tests run in parallel.
t.jobs = 4

const directory = createTemporaryFolder()
t.teardown(() => rm(directory, { recursive: true }))
if (isRoot) chownSync(directory, unprivilegedId, unprivilegedId)
const emptyFolder = join(directory, 'empty')
await mkdir(emptyFolder)

/** The files of a certificate and its private key. */
interface KeyPair {
  certificate: string
  key: string
}

/** Creates a certificate that a CA signs for some hosts, or without a CA a new CA. */
function createKeyPair(name: string, ca?: KeyPair, hosts = ''): KeyPair {
  const pair = { certificate: join(directory, `${name}.crt`), key: join(directory, `${name}.key`) }
  const signature = ca ? ['-CA', ca.certificate, '-CAkey', ca.key, '-addext', `subjectAltName=${hosts}`] : []
  const key = ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes', '-keyout', pair.key]
  const subject = ['-x509', '-days', '1', '-subj', `/CN=${name}`]
  execFileSync('openssl', ['req', ...subject, ...key, '-out', pair.certificate, ...signature], { stdio: 'ignore' })
  // Postgres runs as nobody, and refuses a key that others can read.
  if (isRoot) chownSync(pair.key, unprivilegedId, unprivilegedId)
  return pair
}

const ca = createKeyPair('ca')
const otherCa = createKeyPair('other-ca')
const localhost = createKeyPair('localhost', ca, 'DNS:localhost,IP:127.0.0.1')
const otherHost = createKeyPair('other-host', ca, 'DNS:elsewhere.example')

/** A Postgres user whose name and password need percent-encoding. */
const createUser = (pool: pg.Pool) => pool.query(`CREATE ROLE "gate:keeper" LOGIN SUPERUSER PASSWORD '${password}'`)

/** Returns the URL of a database with that user. */
function withUser(databaseUrl: string): string {
  const url = new URL(databaseUrl)
  url.username = 'gate:keeper'
  url.password = encodeURIComponent(password)
  return url.href
}

/** Returns the URL by which a client verifies the certificate of Postgres and its host name. */
const verifying = (databaseUrl: string) =>
  `${withUser(databaseUrl).replace('127.0.0.1', 'localhost')}?sslmode=verify-full`

const withCa = (databaseUrl: string, certificate: string) =>
  `${databaseUrl}&sslrootcert=${encodeURIComponent(certificate)}`

/** Starts a Postgres that offers TLS. */
async function startTlsPostgres(t: Test, { certificate, key }: KeyPair) {
  const tlsStores = await startStores()
  t.teardown(() => tlsStores.stop())
  const { postgres, databaseUrl } = tlsStores
  await createUser(postgres)
  await postgres.query(`ALTER SYSTEM SET ssl_cert_file = '${certificate}'`)
  await postgres.query(`ALTER SYSTEM SET ssl_key_file = '${key}'`)
  await postgres.query('ALTER SYSTEM SET ssl = on')
  await postgres.query('SELECT pg_reload_conf()')
  await until('Postgres offers TLS', async () => (await postgres.query('SHOW ssl')).rows[0].ssl === 'on')
  return { postgres, url: verifying(databaseUrl) }
}

/** Starts a Redis with a TLS port. */
async function startTlsRedis(t: Test, { certificate, key }: KeyPair) {
  const port = await freePort()
  const { admin } = await startRedis(t, [
    `tls-port ${port}`,
    `tls-cert-file ${certificate}`,
    `tls-key-file ${key}`,
    'tls-auth-clients no'
  ])
  return { admin, url: `rediss://:${encodeURIComponent(password)}@127.0.0.1:${port}/0` }
}

await createUser(postgres)
const tlsPostgres = await startTlsPostgres(t, localhost)
const tlsRedis = await startTlsRedis(t, localhost)

t.test('the service does not start if a store lacks the TLS that its URL demands', async (t) => {
  await checkRefusedStarts(t, {
    'Postgres does not answer: The server does not support SSL connections': {
      DATABASE_URL: verifying(stores.databaseUrl)
    },
    'Redis does not answer: ': { REDIS_URL: stores.redisUrl.replace('redis:', 'rediss:') }
  })
})

t.test('both stores work over verified TLS, with percent-encoded credentials', async (t) => {
  const service = startService(t, {
    DATABASE_URL: withCa(tlsPostgres.url, ca.certificate),
    REDIS_URL: tlsRedis.url,
    NODE_EXTRA_CA_CERTS: ca.certificate
  })
  const url = await service.url()
  const body = await signUpBody()
  await tlsRedis.admin.set(`sms_code_${body.mobile}`, body.sms_code)
  t.equal((await client(url).signUp(body)).statusCode, 201)
  const { rows } = await tlsPostgres.postgres.query(
    `SELECT DISTINCT ssl FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE application_name = 'mobile-signup'`
  )
  t.strictSame(rows, [{ ssl: true }])
})

t.test('the file of a CA is read once, so new connections need it no more', async (t) => {
  const file = join(directory, 'deleted.crt')
  await copyFile(ca.certificate, file)
  const { postgres, url } = await startTlsPostgres(t, localhost)
  const app = await build(t, { DATABASE_URL: withCa(url, file) })
  await rm(file)
  // With a timeout it waits until the connections have ended.
  await postgres.query(
    `SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE application_name = 'mobile-signup'`
  )
  await until('Postgres answers on a new connection', () =>
    app.mobileSignup.postgres.checkWritable().then(
      () => true,
      () => false
    )
  )
})

t.test('with --use-openssl-ca Redis must have a certificate of the CA of SSL_CERT_FILE', async (t) => {
  const trusting = ({ certificate }: KeyPair) => ({
    REDIS_URL: tlsRedis.url,
    NODE_OPTIONS: '--use-openssl-ca',
    SSL_CERT_FILE: certificate,
    SSL_CERT_DIR: emptyFolder
  })
  t.match(await startService(t, trusting(ca)).url(), /^http:/)
  await checkRefusedStarts(t, { 'Redis does not answer: ': trusting(otherCa) })
})

t.test('the service does not start with a certificate of an unknown CA or for another host', async (t) => {
  const otherPostgres = await startTlsPostgres(t, otherHost)
  const otherRedis = await startTlsRedis(t, otherHost)
  await Promise.all([
    checkRefusedStarts(t, {
      'Postgres does not answer: ': { DATABASE_URL: withCa(tlsPostgres.url, otherCa.certificate) },
      'Redis does not answer: ': { REDIS_URL: tlsRedis.url, NODE_EXTRA_CA_CERTS: otherCa.certificate }
    }),
    checkRefusedStarts(t, {
      'Postgres does not answer: Hostname/IP does not match': {
        DATABASE_URL: withCa(otherPostgres.url, ca.certificate)
      },
      'Redis does not answer: Hostname/IP does not match': {
        REDIS_URL: otherRedis.url,
        NODE_EXTRA_CA_CERTS: ca.certificate
      }
    })
  ])
})

/** Starts services that must end with exit code 1 and one line, which begins with the key and contains no password. */
async function checkRefusedStarts(t: Test, environments: Record<string, Environment>) {
  const checks = Object.entries(environments).map(async ([error, env]) => {
    const service = startService(t, env)
    t.strictSame(await service.exit, [1, null])
    const { stdout, stderr } = service
    t.ok(stderr.startsWith(`mobile-signup: ${error}`), stderr)
    t.equal(stderr.trim().split('\n').length, 1)
    for (const secret of [password, encodeURIComponent(password), stores.databaseUrl]) {
      t.notOk((stderr + stdout).includes(secret))
    }
  })
  await Promise.all(checks)
}
