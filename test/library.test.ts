import fastifyCookie from '@fastify/cookie'
import fastifyPostgres from '@fastify/postgres'
import fastifyRedis from '@fastify/redis'
import Fastify from 'fastify'
import t from 'tap'
import * as library from '../src/index.js'
import { cookieOf, redis, signUpBody, stores, testConfig } from './helper.js'

t.test('the package exports buildApp, the config loader, the migrations and the sign-up plugin', async (t) => {
  t.strictSame(Object.keys(library).sort(), ['ConfigError', 'buildApp', 'loadConfig', 'migrate', 'signUp'])
})

t.test('another Fastify application registers the routes, with a prefix and plugins of its own', async (t) => {
  // Fastify's default settings of ajv, which coerce, and the host's own stores, cookies and handlers.
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
  await host.register(library.signUp, { prefix: '/auth', config: testConfig() })

  const reply = await host.inject({ method: 'POST', url: '/auth/users', payload: await signUpBody() })
  t.match([reply.statusCode, reply.json()], [201, { errno: '0', data: { session: true } }])
  const me = await host.inject({ url: '/auth/session', headers: { cookie: cookieOf(reply) } })
  t.equal(me.json().data.mobile, reply.json().data.mobile)

  const coerced = await host.inject({ method: 'POST', url: '/auth/users', payload: await signUpBody({ mobile: 1 }) })
  t.strictSame(
    [coerced.statusCode, coerced.json()],
    [400, { errno: '4103', errmsg: '参数错误' }],
    'strict all the same'
  )

  const large = await host.inject({ method: 'POST', url: '/auth/users', payload: { password: 'x'.repeat(5_000) } })
  t.equal(large.statusCode, 413, 'the limits are its own')

  t.strictSame((await host.inject('/fails')).json(), { host: 'error' })
  t.strictSame((await host.inject('/nowhere')).json(), { host: 'not found' })
  const { payload } = await host.inject({ method: 'POST', url: '/coerces', payload: { n: '1' } })
  t.equal(payload, '[{"n":1}]', 'the host keeps its own settings')
})

t.test(
  'G7: no full mobile and no code reaches a host’s log, whose serializers print all there is of an error',
  async (t) => {
    let log = ''
    const stream = {
      write(line: string) {
        log += line
      }
    }
    const host = Fastify({ logger: { stream } })
    t.after(() => host.close())
    await host.register(library.signUp, { prefix: '/auth', config: testConfig() })
    const body = await signUpBody()
    const key = `sms_code_${body.mobile}`
    await redis.del(key)
    // A command on a key of the wrong type fails with an error that holds the command.
    await redis.lpush(key, body.sms_code)
    const reply = await host.inject({ method: 'POST', url: '/auth/users', payload: body })
    t.strictSame([reply.statusCode, reply.json().errno], [503, '4001'])
    t.match(log, 'WRONGTYPE')
    t.notMatch(log, body.mobile)
  }
)
