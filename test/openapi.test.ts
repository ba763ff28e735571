import { once } from 'node:events'
import { request as httpRequest } from 'node:http'
import type { AddressInfo } from 'node:net'
import { Ajv2020 } from 'ajv/dist/2020.js'
import type { FastifyInstance } from 'fastify'
import t, { type Test } from 'tap'
import type { Environment } from '../src/config/config.js'
import { type OutcomeName, outcomes } from '../src/outcomes.js'
import { FaultProxy } from './fault-proxy.js'
import { build, cookieOf, signUpBody, stores, until } from './helper.js'

interface Reply {
  statusCode: number
  headers: Record<string, unknown>
  body: string
}

interface Media {
  schema: object
  examples: Record<string, { value: { errno: string; errmsg: string } }>
}

interface Operation {
  requestBody?: { content: { 'application/json': { schema: { properties: Record<string, { examples: string[] }> } } } }
  responses: Record<string, { headers?: Record<string, unknown>; content: { 'application/json': Media } }>
}

const ajv = new Ajv2020({ strict: false })

async function documentOf(app: FastifyInstance) {
  const reply = await app.inject('/openapi.json')
  const { openapi, paths }: { openapi: string; paths: Record<string, Record<string, Operation>> } = reply.json()
  return { openapi, paths }
}

const api = (path: string) => `/api/v1.0${path}`
const call = (
  app: FastifyInstance,
  method: 'GET' | 'POST' | 'PUT' | 'DELETE',
  path: string,
  payload?: unknown,
  headers = {}
) => app.inject({ method, url: path, headers, ...(payload !== undefined && { payload: payload as object }) })

t.test('the reply of every outcome, on each route, is as it is described', async (t) => {
  const proxies = await Promise.all([FaultProxy.open(stores.redisUrl), FaultProxy.open(stores.databaseUrl)])
  t.teardown(() => Promise.all(proxies.map((proxy) => proxy.close())))
  const env: Environment = {
    REDIS_URL: proxies[0]?.url,
    DATABASE_URL: proxies[1]?.url,
    HASH_THREADS: '1',
    HASH_MAX_WAIT_MS: '0',
    HASH_MEMORY_KIB: '65536'
  }
  const app = await build(t, env)
  const { paths } = await documentOf(app)
  const seen = new Set<OutcomeName>()

  function check(name: OutcomeName, method: string, path: string, reply: Reply) {
    const about = `${method} ${path}: ${name}`
    const { statusCode, headers, body } = reply
    const { errno, errmsg } = JSON.parse(body)
    const outcome = outcomes[name]
    t.strictSame([statusCode, errno], [outcome.status, outcome.errno], about)
    const response = paths[path]?.[method.toLowerCase()]?.responses[statusCode]
    const media = response?.content['application/json']
    if (response === undefined || media === undefined) throw new Error(`${about} is not described`)
    t.ok(ajv.validate(media.schema, JSON.parse(body)), `${about}: ${ajv.errorsText()}`)
    t.equal(media.examples[name]?.value.errmsg, errmsg, `${about} has its example`)
    for (const header of ['retry-after', 'set-cookie', 'idempotent-replayed', 'x-request-id']) {
      if (headers[header] === undefined) continue
      const described = Object.keys(response.headers ?? {}).map((described) => described.toLowerCase())
      t.ok(described.includes(header), `${about}: ${header}`)
    }
    seen.add(name)
  }

  // What is wrong with a body is the same wherever it stands.
  const body = await signUpBody()
  const wrongBodies = [
    ['missing_parameter', { mobile: '' }],
    ['malformed_parameter', { ...body, mobile: 1 }],
    ['invalid_mobile', { ...body, mobile: '1' }],
    ['body_too_large', { ...body, more: 'x'.repeat(5_000) }]
  ] as const
  for (const [method, route] of [
    ['POST', '/users'],
    ['PUT', '/users/password'],
    ['POST', '/sessions'],
    ['POST', '/sms_codes']
  ] as const) {
    const path = api(route)
    for (const [name, payload] of wrongBodies) check(name, method, path, await call(app, method, path, payload))
    const text = await call(app, method, path, 'a text', { 'content-type': 'text/plain' })
    check('unsupported_content_type', method, path, text)
  }
  for (const [method, route] of [
    ['POST', '/users'],
    ['PUT', '/users/password']
  ] as const) {
    const path = api(route)
    for (const [name, payload] of [
      ['passwords_differ', { ...body, password2: 'another one' }],
      ['password_length', { ...body, password: 'short', password2: 'short' }],
      ['password_common', { ...body, password: 'password', password2: 'password' }],
      ['wrong_code', { ...body, sms_code: 'wrong' }]
    ] as const) {
      check(name, method, path, await call(app, method, path, payload))
    }
  }

  const { mobile } = body
  const [users, reset, login, session] = [api('/users'), api('/users/password'), api('/sessions'), api('/session')]
  const again = await signUpBody({ mobile })
  check('registered', 'POST', users, await call(app, 'POST', users, again))
  const replay = await call(app, 'POST', users, again)
  t.equal(replay.headers['idempotent-replayed'], 'true')
  check('registered', 'POST', users, replay)
  check('mobile_registered', 'POST', users, await call(app, 'POST', users, await signUpBody({ mobile })))
  const fresh = await signUpBody({ mobile })
  check('password_reset', 'PUT', reset, await call(app, 'PUT', reset, fresh))
  const { password } = fresh
  const loggedIn = await call(app, 'POST', login, { mobile, password })
  check('logged_in', 'POST', login, loggedIn)
  check('password_length', 'POST', login, await call(app, 'POST', login, { mobile, password: 'x'.repeat(129) }))
  for (let n = 0; n < 5; n++) {
    check('wrong_login', 'POST', login, await call(app, 'POST', login, { mobile, password: 'wrong' }))
  }
  check('too_many_requests', 'POST', login, await call(app, 'POST', login, { mobile, password: 'wrong' }))

  const cookie = { cookie: cookieOf(loggedIn) }
  check('session_found', 'GET', session, await call(app, 'GET', session, undefined, cookie))
  check('malformed_parameter', 'DELETE', session, await call(app, 'DELETE', `${session}?everywhere=1`))
  check('logged_out', 'DELETE', session, await call(app, 'DELETE', session, undefined, cookie))
  check('not_logged_in', 'GET', session, await call(app, 'GET', session))

  const codes = api('/sms_codes')
  check('code_sent', 'POST', codes, await call(app, 'POST', codes, { mobile }))
  check('too_many_requests', 'POST', codes, await call(app, 'POST', codes, { mobile }))
  const unsent = await build(t, { SMS_WEBHOOK_URL: 'http://127.0.0.1:1/', SMS_RESEND_S: '0' })
  check('sms_gateway_unavailable', 'POST', codes, await call(unsent, 'POST', codes, { mobile }))

  check('healthy', 'GET', '/health/live', await call(app, 'GET', '/health/live'))
  check('healthy', 'GET', '/health/ready', await call(app, 'GET', '/health/ready'))
  check('bad_request', 'GET', session, await withoutHost(t, unsent, session))

  const queued = Array.from({ length: 5 }, () => app.passwords.hash('correct horse'))
  for (const [method, path] of [
    ['POST', users],
    ['PUT', reset],
    ['POST', login]
  ] as const) {
    check('busy', method, path, await call(app, method, path, await signUpBody()))
  }
  await Promise.all(queued)

  const { hash } = app.passwords
  app.passwords.hash = () => Promise.reject(new Error('no memory'))
  check('internal_error', 'POST', users, await call(app, 'POST', users, await signUpBody()))
  app.passwords.hash = hash

  await Promise.all(proxies.map((proxy) => proxy.apply('refuse')))
  for (const [method, path] of [
    ['POST', users],
    ['PUT', reset],
    ['POST', login],
    ['POST', codes]
  ] as const) {
    check('storage_unavailable', method, path, await call(app, method, path, await signUpBody()))
  }
  await until(async () => (await call(app, 'GET', '/health/ready')).statusCode === 503)
  check('storage_unavailable', 'GET', '/health/ready', await call(app, 'GET', '/health/ready'))
  app.connections.announceClosing()
  check('busy', 'GET', '/health/ready', await call(app, 'GET', '/health/ready'))

  // A route that is none has no description.
  seen.add('no_such_route')
  t.strictSame(
    Object.keys(outcomes).filter((name) => ![...seen].some((other) => other === name)),
    [],
    'no outcome is left out'
  )
})

t.test('it is OpenAPI 3.1, its examples are valid, and those of bodies are accepted', async (t) => {
  const app = await build(t)
  const { openapi, paths } = await documentOf(app)
  t.equal(openapi, '3.1.0')
  for (const [path, operations] of Object.entries(paths)) {
    for (const [method, { requestBody, responses }] of Object.entries(operations)) {
      for (const { content } of Object.values(responses)) {
        const { schema, examples } = content['application/json']
        for (const [name, { value }] of Object.entries(examples)) {
          t.ok(ajv.validate(schema, value), `${method} ${path} ${name}: ${ajv.errorsText()}`)
        }
      }
      if (requestBody === undefined) continue
      const { properties } = requestBody.content['application/json'].schema
      const example = Object.entries(properties).map(([name, { examples }]) => [name, examples[0]])
      const payload = Object.fromEntries(example)
      const reply = await app.inject({ method: method === 'put' ? 'PUT' : 'POST', url: path, payload })
      t.not(reply.statusCode, 400, `${method} ${path}`)
    }
  }
})

t.test('under LEGACY_STATUS all outcomes of a route are described with 200, but not those of probes', async (t) => {
  const { paths } = await documentOf(await build(t, { LEGACY_STATUS: 'true', API_PREFIX: '/' }))
  t.strictSame(Object.keys(paths['/users']?.post?.responses ?? {}), ['200', '400'])
  t.strictSame(Object.keys(paths['/health/ready']?.get?.responses ?? {}), ['200', '400', '503'])
})

/** A request of HTTP/1.1 without the header that it must have. */
async function withoutHost(t: Test, app: FastifyInstance, path: string): Promise<Reply> {
  await app.listen({ port: 0, host: '127.0.0.1' })
  const { port } = app.server.address() as AddressInfo
  const request = httpRequest({ port, path, setHost: false })
  t.teardown(() => request.destroy())
  const [response] = await once(request.end(), 'response')
  let body = ''
  for await (const chunk of response) body += chunk
  return { statusCode: response.statusCode, headers: response.headers, body }
}
