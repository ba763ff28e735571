import { once } from 'node:events'
import { request as httpRequest, type IncomingMessage } from 'node:http'
import { Ajv2020 } from 'ajv/dist/2020.js'
import type { FastifyInstance } from 'fastify'
import t, { type Test } from 'tap'
import { type OutcomeName, outcomeNames, outcomes } from '#src/outcomes.js'
import { QueueFull } from '#src/passwords/hash-queue.js'
import { freePort } from '../dev/embedded-stores.js'
import { client } from '../testkit/client.js'
import { startTestbed } from '../testkit/testbed.js'

const { build, openProxy, signUpBody, cookieOf } = await startTestbed(t)

interface Media {
  schema: object
  examples: Record<string, { value: { errno: string; errmsg: string; data?: object } }>
}

interface Operation {
  security?: object[]
  requestBody?: { content: { 'application/json': { schema: { properties: Record<string, { examples: string[] }> } } } }
  responses: Record<string, { headers?: Record<string, unknown>; content: { 'application/json': Media } }>
}

/** The parts of a reply that OpenAPI describes. */
interface DescribedReply {
  statusCode: number
  headers: Record<string, unknown>
  body: string
}

const fieldsOf = (data: object = {}) => Object.keys(data).sort()

const ajv = new Ajv2020({ strict: false })

async function documentOf(app: FastifyInstance) {
  const reply = await app.inject('/openapi.json')
  const { openapi, paths }: { openapi: string; paths: Record<string, Record<string, Operation>> } = reply.json()
  return { openapi, paths }
}

/** Returns a function that compares replies with the document, and the outcomes that it has seen. */
function replyChecker(t: Test, paths: Record<string, Record<string, Operation>>) {
  const seen = new Set<OutcomeName>()
  function check(
    operation: `${'GET' | 'POST' | 'PUT' | 'DELETE'} /${string}`,
    name: OutcomeName,
    reply: DescribedReply
  ) {
    const [method = '', path = ''] = operation.split(' ')
    const about = `${operation}: ${name}`
    const { statusCode, headers, body } = reply
    const { errno, errmsg, data } = JSON.parse(body)
    const outcome = outcomes[name]
    t.strictSame([statusCode, errno], [outcome.status, outcome.errno], about)
    const response = paths[path]?.[method.toLowerCase()]?.responses[statusCode]
    if (response === undefined) throw new Error(`${about} is not described`)
    const media = response.content['application/json']
    t.ok(ajv.validate(media.schema, JSON.parse(body)), `${about} matches its schema: ${ajv.errorsText()}`)
    const example = media.examples[name]?.value
    t.equal(example?.errmsg, errmsg, `${about} has an example`)
    t.strictSame(fieldsOf(example?.data), fieldsOf(data), `the example of ${about} has its data`)
    const describedHeaders = Object.keys(response.headers ?? {}).map((header) => header.toLowerCase())
    for (const header of ['retry-after', 'set-cookie', 'idempotent-replayed', 'x-request-id']) {
      if (headers[header] !== undefined) t.ok(describedHeaders.includes(header), `${about} has the header ${header}`)
    }
    seen.add(name)
  }
  return { check, seen }
}

const signUp = 'POST /api/v1.0/users'
const resetPassword = 'PUT /api/v1.0/users/password'
const logIn = 'POST /api/v1.0/sessions'
const sendCode = 'POST /api/v1.0/sms_codes'
const whoAmI = 'GET /api/v1.0/session'
const logOut = 'DELETE /api/v1.0/session'
const ready = 'GET /health/ready'

t.test('the reply of every outcome on every route matches its description', async (t) => {
  const proxies = [await openProxy(t, 'REDIS_URL'), await openProxy(t, 'DATABASE_URL')] as const
  const [redisProxy, postgresProxy] = proxies
  const app = await build(t, { REDIS_URL: redisProxy.url, DATABASE_URL: postgresProxy.url })
  const api = client(app)
  const { check, seen } = replyChecker(t, (await documentOf(app)).paths)
  const operationsWithBody = [
    [signUp, api.signUp],
    [resetPassword, api.resetPassword],
    [logIn, api.logIn]
  ] as const

  // Invalid bodies.
  const body = await signUpBody()
  const invalidBodies = [
    ['missing_parameter', { mobile: '' }],
    ['malformed_parameter', { ...body, mobile: 1 }],
    ['invalid_mobile', { ...body, mobile: '1' }],
    ['body_too_large', { ...body, more: 'x'.repeat(5_000) }]
  ] as const
  const textType = { headers: { 'content-type': 'text/plain' } }
  for (const [operation, send] of operationsWithBody) {
    for (const [name, invalidBody] of invalidBodies) check(operation, name, await send(invalidBody))
    check(operation, 'unsupported_content_type', await send('a text', textType))
  }
  check(sendCode, 'missing_parameter', await api.sendCode(''))
  check(sendCode, 'malformed_parameter', await api.sendCode(1))
  check(sendCode, 'invalid_mobile', await api.sendCode('1'))
  check(sendCode, 'body_too_large', await api.sendCode('x'.repeat(5_000)))
  check(sendCode, 'unsupported_content_type', await api.sendCode('1', textType))
  // A logout has no body, but Fastify reads one.
  const logOutWith = (payload: string, type: string) =>
    app.inject({ method: 'DELETE', url: '/api/v1.0/session', headers: { 'content-type': type }, payload })
  check(logOut, 'body_too_large', await logOutWith(JSON.stringify('x'.repeat(5_000)), 'application/json'))
  check(logOut, 'unsupported_content_type', await logOutWith('a text', 'text/plain'))
  for (const [operation, send] of operationsWithBody.slice(0, 2)) {
    for (const [name, changes] of [
      ['passwords_differ', { password2: 'another one' }],
      ['password_length', { password: 'short', password2: 'short' }],
      ['password_common', { password: 'password', password2: 'password' }],
      ['wrong_code', { sms_code: 'wrong' }]
    ] as const) {
      check(operation, name, await send({ ...body, ...changes }))
    }
  }

  // Users and their sessions.
  const { mobile } = body
  const user = await signUpBody({ mobile })
  check(signUp, 'registered', await api.signUp(user))
  const replay = await api.signUp(user)
  t.equal(replay.headers['idempotent-replayed'], 'true')
  check(signUp, 'registered', replay)
  check(signUp, 'mobile_registered', await api.signUp(await signUpBody({ mobile })))
  const newPassword = await signUpBody({ mobile })
  check(resetPassword, 'password_reset', await api.resetPassword(newPassword))
  const login = { mobile, password: newPassword.password }
  const loggedIn = await api.logIn(login)
  check(logIn, 'logged_in', loggedIn)
  check(logIn, 'password_length', await api.logIn({ mobile, password: 'x'.repeat(129) }))
  for (let n = 0; n < 5; n++) check(logIn, 'wrong_login', await api.logIn({ mobile, password: 'wrong' }))
  check(logIn, 'too_many_requests', await api.logIn({ mobile, password: 'wrong' }))
  const cookie = cookieOf(loggedIn)
  check(whoAmI, 'session_found', await api.whoAmI(cookie))
  check(logOut, 'malformed_parameter', await api.logOut('', '?everywhere=1'))
  check(logOut, 'logged_out', await api.logOut(cookie))
  check(whoAmI, 'not_logged_in', await api.whoAmI(''))

  // Codes.
  check(sendCode, 'code_sent', await api.sendCode(mobile))
  check(sendCode, 'too_many_requests', await api.sendCode(mobile))
  const SMS_WEBHOOK_URL = `http://127.0.0.1:${await freePort()}/`
  const withoutGateway = await build(t, { SMS_WEBHOOK_URL, SMS_RESEND_S: '0' })
  check(sendCode, 'sms_gateway_unavailable', await client(withoutGateway).sendCode(mobile))

  check('GET /health/live', 'healthy', await app.inject('/health/live'))
  check(ready, 'healthy', await app.inject('/health/ready'))
  check(whoAmI, 'bad_request', await sendWithoutHost(t, withoutGateway, '/api/v1.0/session'))

  // Failures.
  const { admit, hash } = app.mobileSignup.passwords
  app.mobileSignup.passwords.admit = () => {
    throw new QueueFull(1)
  }
  for (const [operation, send] of operationsWithBody) check(operation, 'busy', await send(await signUpBody()))
  app.mobileSignup.passwords.admit = admit
  app.mobileSignup.passwords.hash = () => Promise.reject(new Error('no memory'))
  check(signUp, 'internal_error', await api.signUp(await signUpBody()))
  app.mobileSignup.passwords.hash = hash
  await Promise.all(proxies.map((proxy) => proxy.apply('refuse')))
  for (const [operation, send] of operationsWithBody) {
    check(operation, 'storage_unavailable', await send(await signUpBody()))
  }
  check(sendCode, 'storage_unavailable', await api.sendCode(mobile))
  app.lifecycle.announceShutdown()
  check(ready, 'busy', await app.inject('/health/ready'))

  // An unknown route has no description.
  const unseen = outcomeNames.filter((name) => name !== 'no_such_route' && !seen.has(name))
  t.strictSame(unseen, [], 'every outcome was checked')
})

t.test('the document is OpenAPI 3.1, and its examples are valid', async (t) => {
  const app = await build(t)
  const { openapi, paths } = await documentOf(app)
  t.equal(openapi, '3.1.0')
  for (const method of ['get', 'delete']) {
    t.strictSame(paths['/api/v1.0/session']?.[method]?.security, [{ session: [] }], `${method} takes the cookie`)
  }
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
      const payload = Object.fromEntries(Object.entries(properties).map(([name, { examples }]) => [name, examples[0]]))
      const reply = await app.inject({ method: method === 'put' ? 'PUT' : 'POST', url: path, payload })
      t.not(reply.statusCode, 400, `${method} ${path} accepts its example`)
    }
  }
})

t.test('LEGACY_STATUS describes all outcomes of a route with 200, except those of probes', async (t) => {
  const { paths } = await documentOf(await build(t, { LEGACY_STATUS: 'true', API_PREFIX: '/' }))
  t.strictSame(Object.keys(paths['/users']?.post?.responses ?? {}), ['200', '400'])
  t.strictSame(Object.keys(paths['/health/ready']?.get?.responses ?? {}), ['200', '400', '503'])
})

/** Sends an HTTP/1.1 request without its required Host header. */
async function sendWithoutHost(t: Test, app: FastifyInstance, path: string): Promise<DescribedReply> {
  const url = await app.listen({ port: 0, host: '127.0.0.1' })
  const request = httpRequest(new URL(path, url), { setHost: false })
  t.teardown(() => request.destroy())
  const [response]: IncomingMessage[] = await once(request.end(), 'response')
  if (response?.statusCode === undefined) throw new Error('no response')
  let body = ''
  for await (const chunk of response) body += chunk
  return { statusCode: response.statusCode, headers: response.headers, body }
}
