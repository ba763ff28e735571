import { availableParallelism } from 'node:os'
import t from 'tap'
import { ConfigError, type Environment, loadConfig, loadDatabaseUrl } from '#src/config/config.js'
import { parseRedisUrl } from '#src/config/redis-url.js'
import { describeVariables } from '../testkit/generated-docs.js'

const stores = { DATABASE_URL: 'postgresql://u:p%40ss@db/app', REDIS_URL: 'rediss://:p%40ss@cache:6380/1' }
const secret = 'x'.repeat(32)

function faultsOf(env: Environment): readonly string[] {
  try {
    loadConfig(env)
  } catch (error) {
    if (error instanceof ConfigError) return error.faults
    throw error
  }
  return []
}

t.test('an environment with only the stores gives the documented defaults', async (t) => {
  const { sessionSecrets, ...config } = loadConfig(stores)
  t.strictSame(config, {
    production: false,
    port: 3000,
    host: '127.0.0.1',
    databaseUrl: stores.DATABASE_URL,
    redisUrl: stores.REDIS_URL,
    cookieSecure: false,
    trustProxy: [],
    apiPrefix: '/api/v1.0',
    legacyStatus: false,
    defaultLanguage: 'zh',
    passwordMin: 8,
    sms: true,
    smsCodeAttempts: 5,
    smsGuessDailyMax: 50,
    smsGuessIpHourlyMax: 50,
    smsGuessHourlyMax: 1_000,
    loginIpHourlyMax: 100,
    smsCodeTtlS: 300,
    smsResendS: 60,
    smsDailyMax: 10,
    smsIpHourlyMax: 20,
    smsPrefixHourlyMax: 200,
    smsHourlyMax: 5_000,
    smsWebhookUrl: undefined,
    smsWebhookSecret: undefined,
    hashMemoryKib: 12_288,
    hashPasses: 3,
    hashThreads: Math.min(availableParallelism(), 4),
    poolThreads: 4,
    hashMaxWaitMs: 2_000,
    pgPooler: 'none',
    pgPoolMax: 10,
    storeTimeoutMs: 1_000,
    docs: true,
    otlpEndpoint: undefined,
    metricsPort: undefined,
    keepAliveTimeoutMs: 72_000,
    shutdownDelayMs: 0,
    shutdownTimeoutMs: 15_000,
    logLevel: 'info',
    migrate: true
  })
  t.match(sessionSecrets, [/^.{43}$/], 'a random secret outside production')
  t.notSame(loadConfig(stores).sessionSecrets, sessionSecrets, 'another one at each start')
  t.ok(Object.isFrozen(loadConfig(stores)))
})

t.test('every variable sets its field', async (t) => {
  const env = {
    ...stores,
    NODE_ENV: 'production',
    PORT: '0',
    HOST: '::1',
    SESSION_SECRET: `${secret},${secret}2`,
    COOKIE_SECURE: 'false',
    TRUST_PROXY: '10.0.0.0/8, 192.0.2.1,2001:db8::/32',
    API_PREFIX: '/',
    LEGACY_STATUS: 'true',
    DEFAULT_LANGUAGE: 'en',
    PASSWORD_MIN: '12',
    SMS: 'off',
    SMS_CODE_ATTEMPTS: '3',
    SMS_GUESS_DAILY_MAX: '13',
    SMS_GUESS_IP_HOURLY_MAX: '130',
    SMS_GUESS_HOURLY_MAX: '1300',
    LOGIN_IP_HOURLY_MAX: '15',
    SMS_CODE_TTL_S: '120',
    SMS_RESEND_S: '30',
    SMS_DAILY_MAX: '5',
    SMS_IP_HOURLY_MAX: '7',
    SMS_PREFIX_HOURLY_MAX: '9',
    SMS_HOURLY_MAX: '11',
    SMS_WEBHOOK_URL: 'https://gateway/sms',
    SMS_WEBHOOK_SECRET: 'signs',
    HASH_MEMORY_KIB: '47104',
    HASH_PASSES: '1',
    HASH_THREADS: '5',
    UV_THREADPOOL_SIZE: '9',
    HASH_MAX_WAIT_MS: '700',
    PG_POOL_MAX: '3',
    PG_POOLER: 'transaction',
    STORE_TIMEOUT_MS: '250',
    DOCS: 'true',
    OTEL_EXPORTER_OTLP_ENDPOINT: 'http://collector:4318',
    METRICS_PORT: '9090',
    KEEP_ALIVE_TIMEOUT_MS: '620000',
    SHUTDOWN_DELAY_MS: '50',
    SHUTDOWN_TIMEOUT_MS: '900',
    LOG_LEVEL: 'silent',
    MIGRATE: 'false'
  }
  const names = describeVariables().map(({ name }) => name)
  t.strictSame(Object.keys(env).sort(), names.sort())
  t.match(loadConfig(env), {
    production: true,
    port: 0,
    host: '::1',
    sessionSecrets: [secret, `${secret}2`],
    cookieSecure: false,
    trustProxy: ['10.0.0.0/8', '192.0.2.1', '2001:db8::/32'],
    apiPrefix: '',
    legacyStatus: true,
    defaultLanguage: 'en',
    passwordMin: 12,
    sms: false,
    smsCodeAttempts: 3,
    smsGuessDailyMax: 13,
    smsGuessIpHourlyMax: 130,
    smsGuessHourlyMax: 1_300,
    loginIpHourlyMax: 15,
    smsCodeTtlS: 120,
    smsResendS: 30,
    smsDailyMax: 5,
    smsIpHourlyMax: 7,
    smsPrefixHourlyMax: 9,
    smsHourlyMax: 11,
    smsWebhookUrl: 'https://gateway/sms',
    smsWebhookSecret: 'signs',
    hashMemoryKib: 47_104,
    hashPasses: 1,
    hashThreads: 5,
    poolThreads: 9,
    hashMaxWaitMs: 700,
    pgPoolMax: 3,
    pgPooler: 'transaction',
    storeTimeoutMs: 250,
    docs: true,
    otlpEndpoint: 'http://collector:4318',
    metricsPort: 9_090,
    keepAliveTimeoutMs: 620_000,
    shutdownDelayMs: 50,
    shutdownTimeoutMs: 900,
    logLevel: 'silent',
    migrate: false
  })
})

t.test('one message names every invalid variable, what is wrong with it and what is expected', async (t) => {
  const env = { ...stores, PORT: '70000', LEGACY_STATUS: 'yes', DEFAULT_LANGUAGE: 'fr', PG_POOL_MAX: '1.5' }
  t.throws(() => loadConfig(env), {
    name: 'ConfigError',
    message: `invalid environment:
  PORT: "70000" is out of range; expected an integer from 0 to 65535
  LEGACY_STATUS: "yes" is neither true nor false; expected true or false
  DEFAULT_LANGUAGE: "fr" is not one of them; expected one of zh, en
  PG_POOL_MAX: "1.5" is not an integer; expected an integer from 1 to 1000`
  })
})

t.test('an invalid value of any variable is a fault that names the variable', async (t) => {
  for (const [name, ...values] of [
    ['PORT', '-1', '65536', 'x', '3000 ', '0x10', '1e3', '9'.repeat(400)],
    ['HOST', 'a b', 'http://host', '-host', '1.2.3.4:80'],
    ['DATABASE_URL', 'db', 'mysql://db/app', 'postgres'],
    [
      'REDIS_URL',
      'cache:6379',
      'http://cache',
      'redis://',
      'redis://a,',
      'redis://a,rediss://b',
      'redis://a/1,b',
      'redis://a,b/1',
      'redis://u:p@a,u:q@b',
      'redis://%zz@a',
      'redis://a:0x',
      'redis+sentinel://a',
      'redis+sentinel://a/',
      'redis+sentinel://a/m/x',
      'redis://cache/x',
      'redis://cache/?keyPrefix=x'
    ],
    ['SESSION_SECRET', 'short', `${secret},short`, `${secret},`, ','],
    ['COOKIE_SECURE', 'TRUE', '1', 'auto'],
    [
      'TRUST_PROXY',
      'true',
      '1',
      '10.0.0.0/33',
      '10.0.0.0/',
      '0.0.0.0/0',
      '::/129',
      '10.0.0.0/8,',
      'loopback',
      '1.2.3.4/8/8'
    ],
    ['API_PREFIX', 'api', '/api/', '//', '/a b', '/:id', '/*'],
    ['LEGACY_STATUS', 'on'],
    ['DEFAULT_LANGUAGE', 'ZH', 'zh-CN'],
    ['PASSWORD_MIN', '0', '129'],
    ['SMS', 'true', 'off '],
    ['KEEP_ALIVE_TIMEOUT_MS', '999', '3600001'],
    ['SHUTDOWN_DELAY_MS', '-1', '600001'],
    ['DOCS', 'on'],
    ['OTEL_EXPORTER_OTLP_ENDPOINT', 'collector:4318', 'grpc://collector'],
    ['METRICS_PORT', '-1', '65536', 'on'],
    ['SHUTDOWN_TIMEOUT_MS', '0', '600001'],
    ['SMS_CODE_ATTEMPTS', '0', '1001'],
    ['SMS_GUESS_DAILY_MAX', '-1', '1000001'],
    ['SMS_GUESS_IP_HOURLY_MAX', '-1', '1000000001'],
    ['SMS_GUESS_HOURLY_MAX', '-1', '1000000001'],
    ['LOGIN_IP_HOURLY_MAX', '-1'],
    ['SMS_CODE_TTL_S', '0', '86401'],
    ['SMS_RESEND_S', '-1', '86401'],
    ['SMS_DAILY_MAX', '-1', 'none'],
    ['SMS_IP_HOURLY_MAX', '-1'],
    ['SMS_PREFIX_HOURLY_MAX', '-1'],
    ['SMS_HOURLY_MAX', '-1'],
    ['SMS_WEBHOOK_URL', 'gateway', 'ftp://gateway', 'https://user:pass@gateway'],
    ['HASH_MEMORY_KIB', '7', '4194305'],
    ['HASH_PASSES', '0'],
    ['HASH_THREADS', '0', '1021', 'all'],
    ['UV_THREADPOOL_SIZE', '0', '1025', '-1', 'many'],
    ['HASH_MAX_WAIT_MS', '-1', '600001'],
    ['PG_POOL_MAX', '0'],
    ['PG_POOLER', 'session', 'true'],
    ['STORE_TIMEOUT_MS', '0', '60001'],
    ['LOG_LEVEL', 'verbose'],
    ['MIGRATE', 'no']
  ] as const) {
    for (const value of values) {
      t.match(faultsOf({ ...stores, [name]: value }), [new RegExp(`^${name}: .+; expected .+`)], `${name}=${value}`)
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

t.test('an empty variable counts as unset', async (t) => {
  t.equal(loadConfig({ ...stores, PORT: '', SESSION_SECRET: '' }).port, 3000)
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

t.test('production requires the stores, a secret, a webhook and a strong hash; its cookies are Secure', async (t) => {
  t.match(faultsOf({ NODE_ENV: 'production' }), [
    /^DATABASE_URL, REDIS_URL: /,
    /^SESSION_SECRET: /,
    /^TRUST_PROXY: /,
    /^SMS_WEBHOOK_URL: /
  ])
  const env = { ...stores, NODE_ENV: 'production', SESSION_SECRET: secret, SMS: 'off', TRUST_PROXY: 'none' }
  t.equal(loadConfig(env).cookieSecure, true)
  t.strictSame(loadConfig(env).trustProxy, [])
  t.equal(loadConfig(env).docs, false)
  t.match(faultsOf({ ...env, PASSWORD_MIN: '7' }), [/^PASSWORD_MIN: /])
  for (const [kib, passes, accepted] of [
    ['47104', '1', true],
    ['19456', '2', true],
    ['12288', '3', true],
    ['9216', '4', true],
    ['7168', '5', true],
    ['65536', '9', true],
    ['47103', '1', false],
    ['19455', '2', false],
    ['7167', '9', false],
    ['8', '1', false]
  ] as const) {
    const faults = faultsOf({ ...env, HASH_MEMORY_KIB: kib, HASH_PASSES: passes })
    t.match(faults, accepted ? [] : [/^HASH_MEMORY_KIB, HASH_PASSES: /], `${kib} KiB, ${passes} passes`)
    t.equal(faults.length, accepted ? 0 : 1)
    t.strictSame(
      faultsOf({ ...stores, HASH_MEMORY_KIB: kib, HASH_PASSES: passes }),
      [],
      'any setting is accepted outside production'
    )
  }
})

t.test('production accepts no code that lives longer than ten minutes', async (t) => {
  const env = { ...stores, NODE_ENV: 'production', SESSION_SECRET: secret, SMS: 'off', TRUST_PROXY: 'none' }
  t.equal(loadConfig({ ...env, SMS_CODE_TTL_S: '600' }).smsCodeTtlS, 600)
  t.strictSame(faultsOf({ ...env, SMS_CODE_TTL_S: '601' }), [
    'SMS_CODE_TTL_S: "601" is out of range; expected an integer from 1 to 600'
  ])
  t.equal(loadConfig({ ...stores, SMS_CODE_TTL_S: '601' }).smsCodeTtlS, 601, 'any life outside production')
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
  t.equal(loadDatabaseUrl({ DATABASE_URL: stores.DATABASE_URL }), stores.DATABASE_URL)
  t.equal(loadDatabaseUrl({ DATABASE_URL: stores.DATABASE_URL, PORT: 'http' }), stores.DATABASE_URL)
  t.throws(() => loadDatabaseUrl({}), { name: 'ConfigError', message: /DATABASE_URL: / })
})

t.test('REDIS_URL names a server, nodes of a Cluster, or sentinels of a master', async (t) => {
  const none = { masterName: undefined, options: { db: 0 } }
  for (const [text, target] of [
    ['redis://a', { ...none, topology: 'single', nodes: [{ host: 'a', port: 6_379 }] }],
    [
      'rediss://user:p%40%2F%3A%2C%23%25%C3%BC@[::1]:7/3',
      {
        topology: 'single',
        nodes: [{ host: '::1', port: 7 }],
        masterName: undefined,
        options: { db: 3, username: 'user', password: 'p@/:,#%ü', tls: {} }
      }
    ],
    ...['redis://:p@a:1,b', 'redis://:p@a:1,redis://b', 'redis://:p@a:1,redis://:p@b/0'].map(
      (list) =>
        [
          list,
          {
            topology: 'cluster',
            nodes: [
              { host: 'a', port: 1 },
              { host: 'b', port: 6_379 }
            ],
            masterName: undefined,
            options: { db: 0, password: 'p' }
          }
        ] as const
    ),
    [
      'redis+sentinel://u@a,b:1/sign%20ups/2',
      {
        topology: 'sentinel',
        nodes: [
          { host: 'a', port: 26_379 },
          { host: 'b', port: 1 }
        ],
        masterName: 'sign ups',
        options: { db: 2, username: 'u' }
      }
    ]
  ] as const) {
    t.strictSame(parseRedisUrl(text), target, text)
    t.equal(loadConfig({ ...stores, REDIS_URL: text }).redisUrl, text)
  }
})

t.test('a DATABASE_URL has one host; a comma elsewhere is no second one', (t) => {
  for (const url of [
    'postgresql://a,b/db',
    'postgresql://u:p@a:5432,b:5433/db',
    'postgres://u:p,q@a,b',
    'postgresql:///db?host=a,b',
    'postgresql://u@a/db?sslmode=require&host=a%2Cb'
  ]) {
    const message = /DATABASE_URL: the value has more than one host; expected .*, with one host/
    t.throws(() => loadConfig({ ...stores, DATABASE_URL: url }), { name: 'ConfigError', message }, url)
  }
  for (const url of [
    'postgresql://u:p,q@a/db',
    'postgresql://a/d,b',
    'postgresql://a/db?options=-c%20search_path%3Da,b'
  ]) {
    t.equal(loadConfig({ ...stores, DATABASE_URL: url }).databaseUrl, url)
  }
  t.end()
})
