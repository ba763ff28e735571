import { execFileSync } from 'node:child_process'
import { chownSync } from 'node:fs'
import { copyFile, rm } from 'node:fs/promises'
import { join } from 'node:path'
import t from 'tap'
import { freePort } from '../dev/embedded-stores.js'
import { isRoot, unprivilegedId } from '../dev/guarded-server.js'
import { client } from '../testkit/client.js'
import { startStores } from '../testkit/private-stores.js'
import { temporaryFolderFor } from '../testkit/temporary-folder.js'
import { startTestbed } from '../testkit/testbed.js'
import { isFulfilled, until } from '../testkit/until.js'

const { stores, redis, build, startService, signUpBody } = await startTestbed(t)

// A service that cannot connect waits for 10 s, so all tests run in parallel.
t.jobs = 10

const directory = temporaryFolderFor(t)
if (isRoot) chownSync(directory, unprivilegedId, unprivilegedId)

/** Creates a certificate that a CA signs for localhost, or without a CA a new CA. */
function createKeyPair(name: string, ca?: { certificate: string; key: string }) {
  const pair = { certificate: join(directory, `${name}.crt`), key: join(directory, `${name}.key`) }
  const signature = ca ? ['-CA', ca.certificate, '-CAkey', ca.key, '-addext', 'subjectAltName=DNS:localhost'] : []
  const key = ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes', '-keyout', pair.key]
  const subject = ['-x509', '-days', '1', '-subj', `/CN=${name}`]
  execFileSync('openssl', ['req', ...subject, ...key, '-out', pair.certificate, ...signature], { stdio: 'ignore' })
  // Postgres runs as nobody, and refuses a key that others can read.
  if (isRoot) chownSync(pair.key, unprivilegedId, unprivilegedId)
  return pair
}

const ca = createKeyPair('ca')
const otherCa = createKeyPair('other-ca')
const { certificate, key } = createKeyPair('localhost', ca)

const password = 'p@ss:w/o#r?d,%ü'
const credentials = `gate%3Akeeper:${encodeURIComponent(password)}@`

const tlsStores = await startStores()
t.teardown(() => tlsStores.stop())
await tlsStores.postgres.query(`CREATE ROLE "gate:keeper" LOGIN SUPERUSER PASSWORD '${password}'`)
for (const [name, value] of [
  ['ssl_cert_file', certificate],
  ['ssl_key_file', key],
  ['ssl', 'on']
])
  await tlsStores.postgres.query(`ALTER SYSTEM SET ${name} = '${value}'`)
await tlsStores.postgres.query('SELECT pg_reload_conf()')
await until('Postgres offers TLS', async () => (await tlsStores.postgres.query('SHOW ssl')).rows[0].ssl === 'on')
const postgresAt = (host: string, caFile = ca.certificate) =>
  `postgresql://${credentials}${host}:${new URL(tlsStores.databaseUrl).port}/postgres?sslmode=verify-full&sslrootcert=${caFile}`

const tlsPort = await freePort()
await redis.call('CONFIG', 'SET', 'tls-cert-file', certificate, 'tls-key-file', key, 'tls-auth-clients', 'no')
await redis.config('SET', 'tls-port', tlsPort)
await redis.call('ACL', 'SETUSER', 'gate:keeper', 'on', `>${password}`, '~*', '&*', '+@all')
const redisAt = (host: string) => `rediss://${credentials}${host}:${tlsPort}`

t.test('both stores work over verified TLS, with percent-encoded credentials', async (t) => {
  const env = { DATABASE_URL: postgresAt('localhost'), REDIS_URL: redisAt('localhost') }
  const service = startService(t, { ...env, NODE_EXTRA_CA_CERTS: ca.certificate })
  const body = await signUpBody()
  t.equal((await client(await service.url()).signUp(body)).statusCode, 201)
  const { rows } = await tlsStores.postgres.query(
    `SELECT DISTINCT ssl FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE application_name = 'mobile-signup'`
  )
  t.strictSame(rows, [{ ssl: true }])
  t.match(`${await redis.client('LIST')}`, /user=gate:keeper/)
})

t.test('the file of a CA is read once, so new connections need it no more', async (t) => {
  const file = join(directory, 'deleted.crt')
  await copyFile(ca.certificate, file)
  const app = await build(t, { DATABASE_URL: `${postgresAt('localhost', file)}&application_name=deleted` })
  await rm(file)
  // With a timeout it waits until the connections have ended.
  await tlsStores.postgres.query(
    `SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE application_name = 'deleted'`
  )
  await until('Postgres answers on a new connection', () => isFulfilled(app.mobileSignup.postgres.checkWritable()))
})

t.test('a start that a certificate stops prints one line without the password, and exits with 1', async (t) => {
  const env = { REDIS_URL: redisAt('127.0.0.1'), NODE_EXTRA_CA_CERTS: ca.certificate }
  const service = startService(t, env)
  t.strictSame(await service.exit, [1, null])
  const { stdout, stderr } = service
  t.match(stderr, /^mobile-signup: Redis does not answer: Hostname\/IP does not match [^\n]*\n$/)
  for (const secret of [password, encodeURIComponent(password)]) t.notOk((stderr + stdout).includes(secret))
})

for (const [what, env, message] of [
  [
    'Postgres lacks TLS',
    { DATABASE_URL: `${stores.databaseUrl}?sslmode=verify-full` },
    'The server does not support SSL connections'
  ],
  ['Redis lacks TLS', { REDIS_URL: stores.redisUrl.replace('redis:', 'rediss:') }, /./],
  ['the CA of Postgres is unknown', { DATABASE_URL: postgresAt('localhost', otherCa.certificate) }, /certificate/],
  ['the CA of Redis is unknown', { REDIS_URL: redisAt('localhost') }, /certificate/],
  [
    'the certificate of Postgres is for another host',
    { DATABASE_URL: postgresAt('127.0.0.1') },
    /^Hostname\/IP does not match/
  ]
] as const) {
  t.test(`the service does not start if ${what}`, async (t) => {
    const store = 'REDIS_URL' in env ? 'Redis' : 'Postgres'
    await t.rejects(build(t, env), { message: `${store} does not answer`, cause: { message } })
  })
}
