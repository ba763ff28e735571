import fastifyCookie from '@fastify/cookie'
import fastifyPostgres from '@fastify/postgres'
import fastifyRedis from '@fastify/redis'
import Fastify from 'fastify'
import t from 'tap'
import * as library from '#src/index.js'
import { statusAndErrno } from '../testkit/client.js'
import { startTestbed } from '../testkit/testbed.js'

const { config, cookieOf, redis, signUpBody, stores } = await startTestbed(t)

t.test('the package exports buildApp, the config loader, the migrations and the sign-up plugin', async (t) => {
  t.strictSame(Object.keys(library).sort(), ['ConfigError', 'buildApp', 'loadConfig', 'migrate', 'signUp'])
})

t.test('another Fastify application registers the routes, and keeps its own settings and plugins', async (t) => {
  // With Fastify's default Ajv, which coerces, and with its own stores, cookies and handlers.
  const host = Fastify()
  t.after(() => host.close())
  await host.register(fastifyCookie)
  await host.register(fastifyPostgres, { connectionString: stores.databaseUrl })
  await host.register(fastifyRedis, { url: stores.redisUrl })
  host.setErrorHandler((_error, _request, reply) => reply.code(418).send({ host: 'error' }))
  host.setNotFoundHandler((_request, reply) => reply.code(404).send({ host: 'not found' }))
  host.get('/fails', () => {
    throw new Error('the host fails')
  })
  host.post('/coerces', { schema: { body: { type: 'object', properties: { n: { type: 'number' } } } } }, (request) => [
    request.body
  ])
  await host.register(library.signUp, { prefix: '/auth', config: config() })

  const reply = await host.inject({ method: 'POST', url: '/auth/users', payload: await signUpBody() })
  t.match([reply.statusCode, reply.json()], [201, { errno: '0', data: { session: true } }])
  const me = await host.inject({ url: '/auth/session', headers: { cookie: cookieOf(reply) } })
  t.equal(me.json().data.mobile, reply.json().data.mobile)

  const notCoerced = await host.inject({ method: 'POST', url: '/auth/users', payload: await signUpBody({ mobile: 1 }) })
  t.strictSame(
    [notCoerced.statusCode, notCoerced.json()],
    [400, { errno: '4103', errmsg: '参数错误' }],
    'the routes do not coerce'
  )

  const large = await host.inject({ method: 'POST', url: '/auth/users', payload: { password: 'x'.repeat(5_000) } })
  t.equal(large.statusCode, 413, 'the routes have their own body limit')

  t.strictSame((await host.inject('/fails')).json(), { host: 'error' })
  t.strictSame((await host.inject('/nowhere')).json(), { host: 'not found' })
  const { payload } = await host.inject({ method: 'POST', url: '/coerces', payload: { n: '1' } })
  t.equal(payload, '[{"n":1}]', 'the host still coerces')
})

t.test('G7: no full mobile and no code reaches the log of a host that prints every field of an error', async (t) => {
  let log = ''
  const stream = {
    write(line: string) {
      log += line
    }
  }
  const host = Fastify({ logger: { stream } })
  t.after(() => host.close())
  await host.register(library.signUp, { prefix: '/auth', config: config() })
  const body = await signUpBody()
  const key = `sms_code_${body.mobile}`
  await redis.del(key)
  // A command on a key of the wrong type fails with an error that contains the command.
  await redis.lpush(key, body.sms_code)
  const signUp = () => host.inject({ method: 'POST', url: '/auth/users', payload: body })
  t.strictSame(statusAndErrno(await signUp()), [500, '4500'])
  t.match(log, 'WRONGTYPE', 'the error handler has logged a bug')
  await redis.del(key)
  await redis.set(key, body.sms_code)
  await redis.config('SET', 'maxmemory', '1')
  t.strictSame(statusAndErrno(await signUp()), [503, '4001'])
  await redis.config('SET', 'maxmemory', '0')
  t.match(log, 'OOM', 'the store has logged an outage')
  for (const secret of [body.mobile, body.sms_code]) t.notMatch(log, secret)
})

t.test('every route logs at the level of the host, whatever LOG_LEVEL is', async (t) => {
  const lines: string[] = []
  const host = Fastify({ logger: { stream: { write: (line) => void lines.push(line) } } })
  t.after(() => host.close())
  await host.register(library.signUp, { prefix: '/auth', config: config({ LOG_LEVEL: 'silent' }) })
  for (const [method, url] of [
    ['POST', '/auth/sms_codes'],
    ['POST', '/auth/users'],
    ['PUT', '/auth/users/password'],
    ['POST', '/auth/sessions'],
    ['GET', '/auth/session'],
    ['DELETE', '/auth/session']
  ] as const) {
    lines.length = 0
    await host.inject({ method, url, ...(method === 'POST' || method === 'PUT' ? { payload: {} } : {}) })
    t.equal(lines.filter((line) => line.includes('request completed')).length, 1, `${method} ${url}`)
  }
})
