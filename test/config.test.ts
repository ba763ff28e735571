import { availableParallelism } from 'node:os'
import t from 'tap'
import { type Config, ConfigError, type Environment, loadConfig, loadDatabaseUrl } from '#src/config/config.js'
import { parseRedisUrl } from '#src/config/redis-url.js'
import { describeVariables } from '../testkit/generated-docs.js'

/*
 * The environment of the service. test/docs.test.ts compares the defaults with those that docs/operating.md promises.
 */

const stores = { DATABASE_URL: 'postgresql://u:p%40ss@db/app', REDIS_URL: 'rediss://:p%40ss@cache:6380/1' }
const secret = 'x'.repeat(32)
const secrets = [secret, `${secret}2`]
const production = { ...stores, NODE_ENV: 'production', SESSION_SECRET: secret, SMS: 'off', TRUST_PROXY: 'none' }

function faultsOf(env: Environment): readonly string[] {
  try {
    loadConfig(env)
  } catch (error) {
    if (error instanceof ConfigError) return error.faults
    throw error
  }
  return []
}

/** Each variable with a valid text, its field and value, and with invalid texts. */
const variables: [name: string, text: string, field: keyof Config, value: unknown, ...invalid: string[]][] = [
  ['NODE_ENV', 'test', 'production', false],
  ['PORT', '0', 'port', 0, '-1', '65536', 'x', '3000 ', '0x10', '1e3', '9'.repeat(400)],
  ['HOST', '::1', 'host', '::1', 'a b', 'http://host', '-host', '1.2.3.4:80'],
  ['DATABASE_URL', 'postgres://u@a/b', 'databaseUrl', 'postgres://u@a/b', 'db', 'mysql://db/app', 'postgres'],
  ['REDIS_URL', 'redis://a', 'redisUrl', 'redis://a', 'cache:6379', 'http://cache', 'redis://'],
  ['SESSION_SECRET', secrets.join(), 'sessionSecrets', secrets, 'short', `${secret},short`, `${secret},`, ','],
  ['COOKIE_SECURE', 'true', 'cookieSecure', true, 'TRUE', '1', 'auto'],
  [
    'TRUST_PROXY',
    '10.0.0.0/8, 192.0.2.1,2001:db8::/32',
    'trustProxy',
    ['10.0.0.0/8', '192.0.2.1', '2001:db8::/32'],
    ...['true', '1', '10.0.0.0/33', '10.0.0.0/', '0.0.0.0/0', '::/129', '10.0.0.0/8,', 'loopback', '1.2.3.4/8/8']
  ],
  ['API_PREFIX', '/', 'apiPrefix', '', 'api', '/api/', '//', '/a b', '/:id', '/*'],
  ['LEGACY_STATUS', 'true', 'legacyStatus', true, 'on'],
  ['DEFAULT_LANGUAGE', 'en', 'defaultLanguage', 'en', 'ZH', 'zh-CN'],
  ['PASSWORD_MIN', '12', 'passwordMin', 12, '0', '129'],
  ['SMS', 'off', 'sms', false, 'true', 'off '],
  ['SMS_CODE_ATTEMPTS', '3', 'smsCodeAttempts', 3, '0', '1001'],
  ['SMS_GUESS_DAILY_MAX', '13', 'smsGuessDailyMax', 13, '-1', '1000000001'],
  ['SMS_GUESS_IP_HOURLY_MAX', '130', 'smsGuessIpHourlyMax', 130, '-1', '1000000001'],
  ['SMS_GUESS_HOURLY_MAX', '1300', 'smsGuessHourlyMax', 1_300, '-1', '1000000001'],
  ['LOGIN_IP_HOURLY_MAX', '15', 'loginIpHourlyMax', 15, '-1'],
  ['SMS_CODE_TTL_S', '120', 'smsCodeTtlS', 120, '0', '86401'],
  ['SMS_RESEND_S', '30', 'smsResendS', 30, '-1', '86401'],
  ['SMS_DAILY_MAX', '5', 'smsDailyMax', 5, '-1', 'none'],
  ['SMS_IP_HOURLY_MAX', '7', 'smsIpHourlyMax', 7, '-1'],
  ['SMS_PREFIX_HOURLY_MAX', '9', 'smsPrefixHourlyMax', 9, '-1'],
  ['SMS_HOURLY_MAX', '11', 'smsHourlyMax', 11, '-1'],
  ['SMS_WEBHOOK_URL', 'https://a/sms', 'smsWebhookUrl', 'https://a/sms', 'gateway', 'ftp://a', 'https://u:p@a'],
  ['SMS_WEBHOOK_SECRET', 'signs', 'smsWebhookSecret', 'signs'],
  ['EVENTS_WEBHOOK_URL', 'http://a/events', 'eventsWebhookUrl', 'http://a/events', 'receiver', 'ftp://a'],
  ['EVENTS_WEBHOOK_SECRET', 'signs', 'eventsWebhookSecret', 'signs'],
  ['HASH_MEMORY_KIB', '47104', 'hashMemoryKib', 47_104, '7', '262145'],
  ['HASH_PASSES', '1', 'hashPasses', 1, '0', '11'],
  ['HASH_THREADS', '1', 'hashThreads', 1, '0', '1021', 'all'],
  ['UV_THREADPOOL_SIZE', '9', 'poolThreads', 9, '0', '1025', '-1', 'many'],
  ['HASH_MAX_WAIT_MS', '700', 'hashMaxWaitMs', 700, '-1', '600001'],
  ['PG_POOL_MAX', '3', 'pgPoolMax', 3, '0'],
  ['PG_POOLER', 'transaction', 'pgPooler', 'transaction', 'session', 'true'],
  ['STORE_TIMEOUT_MS', '250', 'storeTimeoutMs', 250, '0', '60001'],
  ['DOCS', 'false', 'docs', false, 'on'],
  ['OTEL_EXPORTER_OTLP_ENDPOINT', 'http://a:4318', 'otlpEndpoint', 'http://a:4318', 'a:4318', 'grpc://a'],
  ['METRICS_PORT', '9090', 'metricsPort', 9_090, '-1', '65536', 'on'],
  ['KEEP_ALIVE_TIMEOUT_MS', '620000', 'keepAliveTimeoutMs', 620_000, '999', '3600001'],
  ['SHUTDOWN_DELAY_MS', '50', 'shutdownDelayMs', 50, '-1', '600001'],
  ['SHUTDOWN_TIMEOUT_MS', '900', 'shutdownTimeoutMs', 900, '0', '600001'],
  ['LOG_LEVEL', 'silent', 'logLevel', 'silent', 'verbose'],
  ['MIGRATE', 'false', 'migrate', false, 'no']
]

t.test('every variable sets its field, and an invalid value is a fault that names it', async (t) => {
  for (const [name, text, field, value, ...invalidTexts] of variables) {
    t.strictSame(loadConfig({ ...stores, [name]: text })[field], value, name)
    for (const invalid of invalidTexts) {
      t.match(faultsOf({ ...stores, [name]: invalid }), [new RegExp(`^${name}: .+; expected .+`)], `${name}=${invalid}`)
    }
  }
  const documented = describeVariables().map(({ name }) => name)
  t.strictSame(variables.map(([name]) => name).sort(), documented.sort())
})

t.test('one message names every invalid variable, what is wrong with it and what is expected', async (t) => {
  const env = { ...stores, PORT: '70000', LEGACY_STATUS: 'yes', DEFAULT_LANGUAGE: 'fr', PG_POOL_MAX: '1.5' }
  t.throws(() => loadConfig(env), {
    name: 'ConfigError',
    message: `invalid environment:
  PORT: is "70000"; expected an integer from 0 to 65535
  LEGACY_STATUS: is "yes"; expected true or false
  DEFAULT_LANGUAGE: is "fr"; expected one of zh, en
  PG_POOL_MAX: is "1.5"; expected an integer from 1 to 1000`
  })
})

t.test('G7: no fault quotes a secret', async (t) => {
  const faults = faultsOf({
    DATABASE_URL: 'mysql://user:hunter22@db/app',
    REDIS_URL: 'hunter22',
    SESSION_SECRET: `${secret},hunter22`
  })
  t.equal(faults.length, 3)
  t.notMatch(faults.join(), 'hunter22')
})

t.test('the configuration is frozen, and by default each start makes up a secret', async (t) => {
  const [first, second] = [loadConfig(stores), loadConfig({ ...stores, SESSION_SECRET: '' })]
  t.ok(Object.isFrozen(first))
  t.match(first.sessionSecrets, [/^.{43}$/])
  t.notSame(first.sessionSecrets, second.sessionSecrets)
})

t.test('production requires the stores, a secret, the proxies and a webhook; its cookies are Secure', async (t) => {
  t.match(faultsOf({ NODE_ENV: 'production' }), [
    /^DATABASE_URL, REDIS_URL: /,
    /^SESSION_SECRET: /,
    /^TRUST_PROXY: /,
    /^SMS_WEBHOOK_URL: /
  ])
  t.match(loadConfig(production), { production: true, cookieSecure: true, trustProxy: [], docs: false })
})

t.test('production refuses what is weaker than OWASP and NIST allow, which other environments accept', async (t) => {
  for (const [names, accepted, refused] of [
    [
      'HASH_MEMORY_KIB, HASH_PASSES',
      ['47104 1', '19456 2', '12288 3', '9216 4', '7168 5', '65536 9'],
      ['47103 1', '19455 2', '7167 9', '8 1']
    ],
    ['PASSWORD_MIN', ['8'], ['7']],
    ['SMS_CODE_TTL_S', ['600'], ['601']]
  ] as [names: string, accepted: string[], refused: string[]][]) {
    for (const text of [...accepted, ...refused]) {
      const values = text.split(' ')
      const env = Object.fromEntries(names.split(', ').map((name, n) => [name, values[n]]))
      const faults = faultsOf({ ...production, ...env })
      t.equal(faults.length, accepted.includes(text) ? 0 : 1, `${names}: ${text}`)
      for (const fault of faults) t.match(fault, new RegExp(`^${names}: .*; expected `))
      t.strictSame(faultsOf({ ...stores, ...env }), [], 'outside production')
    }
  }
})

t.test('HASH_THREADS is at most the pool of libuv, and by default no more than the cores', async (t) => {
  t.strictSame(faultsOf({ ...stores, HASH_THREADS: '8' }), [
    "HASH_THREADS: 8 is more than libuv's pool of 4 threads can run; " +
      'expected at most 4, or set UV_THREADPOOL_SIZE=8 in the environment of the process'
  ])
  t.strictSame(faultsOf({ ...stores, HASH_THREADS: '8', UV_THREADPOOL_SIZE: '8' }), [])
  const withPool = (size: string) => loadConfig({ ...stores, UV_THREADPOOL_SIZE: size }).hashThreads
  t.strictSame([withPool('1'), withPool('1024')], [1, availableParallelism()])
  t.match(faultsOf({ ...stores, UV_THREADPOOL_SIZE: '' }), [/^UV_THREADPOOL_SIZE: /], 'libuv would take it for 1')
})

t.test('with a pooler there are no migrations at the start', async (t) => {
  t.equal(loadConfig({ ...stores, PG_POOLER: 'transaction' }).migrate, false)
  t.strictSame(faultsOf({ ...stores, PG_POOLER: 'transaction', MIGRATE: 'true' }), [
    'MIGRATE: is true; expected false with PG_POOLER=transaction'
  ])
})

t.test('both store URLs are required; outside production the fault names npm start', async (t) => {
  const { DATABASE_URL, REDIS_URL } = stores
  for (const [env, names] of [
    [{}, 'DATABASE_URL, REDIS_URL'],
    [{ DATABASE_URL: '', REDIS_URL: '' }, 'DATABASE_URL, REDIS_URL'],
    [{ REDIS_URL }, 'DATABASE_URL'],
    [{ DATABASE_URL }, 'REDIS_URL']
  ] as const) {
    t.match(faultsOf(env), [new RegExp(`^${names}: unset; expected .* \`npm start\``)])
    const [fault] = faultsOf({ ...env, NODE_ENV: 'production' })
    t.match(fault, `${names}: unset; expected `)
    t.notMatch(fault, 'npm start')
  }
})

t.test('npm run migrate reads only the variables of Postgres', async (t) => {
  t.equal(loadDatabaseUrl({ DATABASE_URL: stores.DATABASE_URL, PORT: 'http' }), stores.DATABASE_URL)
  t.throws(() => loadDatabaseUrl({}), { name: 'ConfigError', message: /DATABASE_URL: / })
})

t.test('REDIS_URL names a server, nodes of a Cluster, or sentinels of a master', async (t) => {
  for (const [texts, topology, hosts, options, masterName] of [
    ['redis://a', 'single', 'a:6379', { db: 0 }],
    [
      'rediss://user:p%40%2F%3A%2C%23%25%C3%BC@[::1]:7/3',
      'single',
      '::1:7',
      { db: 3, username: 'user', password: 'p@/:,#%ü', tls: {} }
    ],
    [
      'redis://:p@a:1,b redis://:p@a:1,redis://b redis://:p@a:1,redis://:p@b/0',
      'cluster',
      'a:1 b:6379',
      { db: 0, password: 'p' }
    ],
    ['redis+sentinel://u@a,b:1/sign%20ups/2', 'sentinel', 'a:26379 b:1', { db: 2, username: 'u' }, 'sign ups']
  ] as const) {
    for (const text of texts.split(' ')) {
      const { nodes, ...target } = parseRedisUrl(text)
      t.strictSame(target, { topology, masterName, options }, text)
      t.equal(nodes.map(({ host, port }) => `${host}:${port}`).join(' '), hosts, text)
    }
  }
  const lists = 'redis://a, redis://a,rediss://b redis://a/1,b redis://a,b/1 redis://u:p@a,u:q@b'
  const sentinels = 'redis+sentinel://a redis+sentinel://a/ redis+sentinel://a/m/x'
  const others = 'redis://%zz@a redis://a:0x redis://cache/x redis://cache/?keyPrefix=x'
  for (const text of `${lists} ${sentinels} ${others}`.split(' ')) {
    t.match(faultsOf({ ...stores, REDIS_URL: text }), [/^REDIS_URL: the value .*; expected /], text)
  }
})

t.test('a DATABASE_URL has one host; a comma elsewhere is no second one', async (t) => {
  for (const url of [
    'postgresql://a,b/db',
    'postgresql://u:p@a:5432,b:5433/db',
    'postgres://u:p,q@a,b',
    'postgresql:///db?host=a,b',
    'postgresql://u@a/db?sslmode=require&host=a%2Cb'
  ]) {
    const fault = /^DATABASE_URL: the value has more than one host; expected .*, with one host$/
    t.match(faultsOf({ ...stores, DATABASE_URL: url }), [fault], url)
  }
  for (const url of [
    'postgresql://u:p,q@a/db',
    'postgresql://a/d,b',
    'postgresql://a/db?options=-c%20search_path%3Da,b'
  ]) {
    t.equal(loadConfig({ ...stores, DATABASE_URL: url }).databaseUrl, url)
  }
})
