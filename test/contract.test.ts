import assert from 'node:assert/strict'
import fastifyCookie from '@fastify/cookie'
import fastifyPostgres from '@fastify/postgres'
import fastifyRedis from '@fastify/redis'
import fc from 'fast-check'
import Fastify, { type FastifyInstance } from 'fastify'
import t, { type Test } from 'tap'
import * as library from '#src/index.js'
import type { OutcomeName } from '#src/outcomes.js'
import { QueueFull } from '#src/passwords/hash-queue.js'
import { client, type Reply, statusAndErrno } from '../testkit/client.js'
import { type SignUpBody, startTestbed } from '../testkit/testbed.js'
import { retried } from '../testkit/until.js'

/*
 * The HTTP contract of the routes of users and sessions: what each outcome looks like, and which fault of a request is told. This copy
 * of the outcome table does not come from src, so a change of src fails the tests.
 */

const contract: Record<OutcomeName, [status: number, errno: string, zh: string, en: string]> = {
  registered: [201, '0', '注册成功', 'Registered'],
  logged_in: [201, '0', '登录成功', 'Logged in'],
  code_sent: [202, '0', '发送成功', 'Sent'],
  password_reset: [200, '0', '密码已重置', 'Password reset'],
  healthy: [200, '0', '成功', 'OK'],
  session_found: [200, '0', '成功', 'OK'],
  logged_out: [200, '0', '退出成功', 'Logged out'],
  account_deleted: [200, '0', '注销成功', 'Account deleted'],
  missing_parameter: [400, '4103', '参数不完整', 'A required parameter is missing'],
  malformed_parameter: [400, '4103', '参数错误', 'Malformed parameter'],
  invalid_mobile: [400, '4103', '手机号格式错误', 'Invalid mobile number'],
  passwords_differ: [400, '4103', '两次密码不一致', 'The passwords differ'],
  password_length: [400, '4103', '密码须为8至128个字符', 'The password must have 8 to 128 characters'],
  password_common: [400, '4103', '密码过于常见', 'The password is too common'],
  body_too_large: [413, '4103', '请求体过大', 'Body too large'],
  unsupported_content_type: [415, '4103', '不支持的内容类型', 'Unsupported content type'],
  wrong_code: [422, '4004', '短信验证码错误', 'Wrong SMS code'],
  mobile_registered: [409, '4003', '手机号已存在', 'Mobile already registered'],
  not_logged_in: [401, '4101', '用户未登录', 'Not logged in'],
  wrong_login: [401, '4102', '用户名或密码错误', 'Wrong mobile or password'],
  no_such_route: [404, '4201', '非法请求', 'No such route'],
  bad_request: [400, '4201', '非法请求', 'Bad request'],
  too_many_requests: [429, '4201', '请求过于频繁，请稍后重试', 'Too many requests'],
  storage_unavailable: [503, '4001', '数据库异常', 'Storage unavailable'],
  busy: [503, '4500', '服务繁忙，请稍后重试', 'Busy, try again'],
  sms_gateway_unavailable: [503, '4301', '第三方系统错误', 'SMS gateway unavailable'],
  internal_error: [500, '4500', '内部错误', 'Internal error']
}

const { build, config, cookieOf, issueCode, newMobile, openProxy, redis, signUpBody, stores, userRows } =
  await startTestbed(t)

/** A route beside the service that answers with any outcome. */
async function anyOutcome(app: FastifyInstance) {
  app.get<{ Params: { name: OutcomeName } }>('/outcomes/:name', ({ params }, reply) => reply.outcome(params.name))
}

const withPassword = (password: string) => ({ password, password2: password })

const proxy = await openProxy(t, 'REDIS_URL')
const env = { REDIS_URL: proxy.url, SMS_CODE_ATTEMPTS: '1000', SMS_GUESS_DAILY_MAX: '0' }
const app = await build(t, env, { page: anyOutcome })
const api = client(app)

/** Checks that a reply is that of a refusal in the table: its status, its body, and no cookie. */
function checkRefusal(t: Test, reply: Reply, name: OutcomeName, what: string = name) {
  const [status, errno, errmsg] = contract[name]
  t.strictSame([reply.statusCode, reply.json()], [status, { errno, errmsg }], what)
  t.equal(reply.headers['set-cookie'], undefined, what)
}

t.test('every outcome has its row of the table, in both languages; 429 and 503 have Retry-After', async (t) => {
  const legacyApp = await build(t, { LEGACY_STATUS: 'true' }, { page: anyOutcome })
  for (const [name, [status, errno, zh, en]] of Object.entries(contract)) {
    for (const [language, errmsg] of Object.entries({ zh, en })) {
      for (const target of [app, legacyApp]) {
        // What HTTP parsing refuses keeps its status.
        const expected = target === legacyApp && name !== 'bad_request' ? 200 : status
        const reply = await target.inject({ url: `/outcomes/${name}`, headers: { 'accept-language': language } })
        t.strictSame([reply.statusCode, reply.json()], [expected, { errno, errmsg }], name)
        const hasRetryAfter = /^[1-9]\d*$/.test(`${reply.headers['retry-after']}`)
        t.equal(hasRetryAfter, status === 429 || status === 503, name)
      }
    }
  }

  const legacy = client(legacyApp)
  const body = await signUpBody()
  for (const [reply, errno] of [
    [await legacy.signUp(body), '0'],
    [await legacy.signUp({ ...body, sms_code: 'wrong' }), '4004'],
    [await legacy.whoAmI(''), '4101'],
    [await legacyApp.inject('/nowhere'), '4201']
  ] as const) {
    t.strictSame(statusAndErrno(reply), [200, errno])
  }
})

t.test('Accept-Language chooses zh or en', async (t) => {
  const [, , zh, en] = contract.malformed_parameter
  const headers = { 'en-US,en;q=0.9,zh;q=0.5': en, 'zh-CN,zh;q=0.9,en;q=0.8': zh, 'en;q=0.1, zh;q=0.2': zh }
  const others = { 'fr, en;q=0.1': en, fr: zh, '*': zh, ';;;q=x': zh }
  for (const [header, errmsg] of Object.entries({ ...headers, ...others })) {
    t.equal((await api.signUp('1', { headers: { 'accept-language': header } })).json().errmsg, errmsg, header)
  }
})

t.test('API_PREFIX moves the routes, and DEFAULT_LANGUAGE and PASSWORD_MIN change the messages', async (t) => {
  const app = await build(t, { API_PREFIX: '/', DEFAULT_LANGUAGE: 'en', PASSWORD_MIN: '12' })
  const signUp = async (changes = {}, headers = {}) =>
    (await app.inject({ method: 'POST', url: '/users', payload: await signUpBody(changes), headers })).json().errmsg
  t.equal(await signUp(), 'Registered')
  const tooShort = withPassword('eleven char')
  t.equal(await signUp(tooShort), 'The password must have 12 to 128 characters')
  t.equal(await signUp(tooShort, { 'accept-language': 'zh' }), '密码须为12至128个字符')
})

t.test('400: a body that is no JSON object, or no UTF-8, is malformed', async (t) => {
  for (const body of ['', '{', '{"mobile":}', 'null', '[]', '"text"', '1', '{}}', "{'mobile': 1}"]) {
    checkRefusal(t, await api.signUp(body), 'malformed_parameter', body)
  }
  // Decoding would replace each by the same character, so that different passwords would become one.
  const body = JSON.stringify(await signUpBody(withPassword('a password @')))
  for (const bytes of [[0xff], [0xc0, 0xaf], [0xed, 0xa0, 0x80]]) {
    const invalid = Buffer.from(body.replaceAll('@', Buffer.from(bytes).toString('latin1')), 'latin1')
    checkRefusal(t, await api.signUp(invalid), 'malformed_parameter')
  }
  checkRefusal(t, await api.signUp(body.replaceAll('@', '\\ud800')), 'malformed_parameter')
})

t.test('400: a new password with an unassigned code point, whose NFKC may change, is malformed', async (t) => {
  const body = await signUpBody()
  for (const character of ['\u0378', '\u{1ffff}', '\ufdd0', '\u{e01f0}', '\u{2fe0}']) {
    const password = `a password ${character}`
    for (const send of [api.signUp, api.resetPassword]) {
      checkRefusal(t, await send({ ...body, ...withPassword(password) }), 'malformed_parameter')
    }
    checkRefusal(t, await api.logIn({ mobile: newMobile(), password }), 'wrong_login')
  }
  const assigned = await signUpBody(withPassword('a password \ue000\u{10fffd}\u{20000}\n\0\u200d\u0301'))
  t.equal((await api.signUp(assigned)).statusCode, 201)
})

t.test('413, 415 and 404: too large a body, another content type, an unknown route or method', async (t) => {
  const body = JSON.stringify(await signUpBody())
  checkRefusal(t, await api.signUp(body.padEnd(4097)), 'body_too_large')
  for (const type of ['text/plain', 'application/x-www-form-urlencoded', 'multipart/form-data; boundary=x', ';;']) {
    checkRefusal(t, await api.signUp(body, { headers: { 'content-type': type } }), 'unsupported_content_type', type)
  }
  const headers = { 'content-type': 'text/plain' }
  for (const url of ['/users', '/api/v1.0/users/', '/api/v1.0/session', '/']) {
    checkRefusal(t, await app.inject({ method: 'POST', url, headers }), 'no_such_route', url)
  }
  for (const method of ['GET', 'PUT', 'OPTIONS'] as const) {
    checkRefusal(t, await app.inject({ method, url: '/api/v1.0/users', headers }), 'no_such_route', method)
  }
  const json = { 'content-type': 'application/json; charset=utf-8' }
  t.equal((await api.signUp(body.padEnd(4096), { headers: json })).statusCode, 201)
})

t.test('unknown fields are ignored, also __proto__ and constructor', async (t) => {
  const valid = await signUpBody()
  const others = { id: 1, user_id: '7', name: 'other', created_at: 0, session_epoch: 9, constructor: { prototype: 1 } }
  const body = JSON.stringify({ ...valid, ...others })
  const reply = await api.signUp(body.replace('{', '{"__proto__": {"mobile": 1, "isPolluted": true}, '))
  const { mobile } = valid
  const [{ id, created_at, ...row }] = await userRows(mobile)
  t.match({ ...row, isNew: created_at > new Date(0) }, { mobile, name: mobile, session_epoch: 0, isNew: true })
  t.strictSame([reply.statusCode, reply.json().data], [201, { user_id: id, name: mobile, mobile, session: true }])
  t.notOk('isPolluted' in {}, 'no prototype has changed')
})

t.test('503 and 500: a store that fails, a full hash queue, and a bug that tells nothing of its cause', async (t) => {
  const { passwords } = app.mobileSignup
  const logIn = ({ mobile, password }: SignUpBody) => api.logIn({ mobile, password })
  for (const send of [api.signUp, api.resetPassword, logIn]) {
    const body = await signUpBody()
    await api.signUp(body)
    await issueCode(body.mobile, body.sms_code)
    proxy.strike(body.mobile, { kind: 'reset' })
    checkRefusal(t, await send(body), 'storage_unavailable')
    for (const outcome of ['busy', 'internal_error'] as const) {
      const admit = () => {
        throw outcome === 'busy' ? new QueueFull(7) : new Error('a secret cause')
      }
      const { restore } = t.intercept(passwords.queue, 'admit', { value: admit })
      const reply = await send(body)
      restore()
      checkRefusal(t, reply, outcome)
      t.equal(reply.headers['retry-after'], outcome === 'busy' ? '7' : undefined)
    }
    t.ok((await retried(() => send(body))).statusCode < 422, 'then the same request is answered')
  }
})

const fields = ['mobile', 'sms_code', 'password', 'password2'] as const
const valid = { mobile: '13900001111', sms_code: 'wrong', ...withPassword('correct horse') }
const invalidMobiles = [
  '1390000111',
  '139000011110',
  '12900001111',
  '１３９００００１１１１',
  '1390000111a',
  '13900001111\n'
]
const badPasswords = [
  'password',
  'PassWord1',
  'ｐａｓｓｗｏｒｄ１',
  '13900001111',
  'sev3n&7',
  '𠮷𠮷𠮷𠮷𠮷𠮷𠮷',
  'ﬁﬁﬁﬁﬁﬁ',
  '\ud800 is half'
]

/** A model: the outcome of a sign-up or a reset whose code is wrong. Lengths count code points of the text as sent. */
function expectedOutcome(body: unknown): OutcomeName {
  if (typeof body !== 'object' || body === null || Array.isArray(body)) return 'malformed_parameter'
  const given = new Map(Object.entries(body))
  const values = fields.map((name) => given.get(name))
  if (values.some((value) => value === undefined || value === null || value === '')) return 'missing_parameter'
  const texts = values.filter((value) => typeof value === 'string')
  const [mobile = '', code = '', password = '', password2] = texts
  if (texts.length < 4 || [...code].length > 64) return 'malformed_parameter'
  if (texts.some((text) => /\p{Surrogate}/u.test(text))) return 'malformed_parameter'
  if (mobile.length !== 11 || !/^1[3-9]/.test(mobile) || /[^0-9]/.test(mobile)) return 'invalid_mobile'
  if (password !== password2) return 'passwords_differ'
  if ([...password].length < 8 || [...password].length > 128) return 'password_length'
  const canonical = password.normalize('NFKC').toLowerCase()
  return [mobile, 'password', 'password1'].includes(canonical) ? 'password_common' : 'wrong_code'
}

t.test('400, 422: a new password is refused for its first fault in the order of the table', async (t) => {
  const examples = [
    ...fields.flatMap((field) => [undefined, null, '', 1, false, ['text'], {}].map((value) => ({ [field]: value }))),
    ...invalidMobiles.map((mobile) => ({ mobile })),
    ...[...badPasswords, '§'.repeat(8), '§'.repeat(128), '§'.repeat(129)].map(withPassword),
    { sms_code: 'c'.repeat(64) },
    { sms_code: 'c'.repeat(65) },
    { password2: 'another password' }
  ]
  const anything = fc.oneof(fc.constantFrom('', null, undefined), fc.jsonValue({ maxDepth: 1 }))
  const mostly = (...usual: fc.Arbitrary<string>[]) =>
    fc.oneof({ weight: 8, arbitrary: fc.oneof(...usual) }, { weight: 1, arbitrary: anything })
  const password = mostly(
    fc.constantFrom(...badPasswords),
    // With a character that no common password has, because the model does not know the list.
    fc.string({ minLength: 5, maxLength: 12, unit: 'grapheme' }).map((text) => `${text}§`)
  )
  const mobile = mostly(fc.constant(valid.mobile), fc.constantFrom(...invalidMobiles))
  const sms_code = mostly(fc.string({ minLength: 1, maxLength: 68, size: 'max' }))
  const body = fc
    .record({ mobile, sms_code, password, password2: password })
    .chain((body) => fc.constantFrom(body, { ...body, password2: body.password, unknown: 1 }))
  const anyBody = fc.oneof({ weight: 20, arbitrary: body }, { weight: 1, arbitrary: fc.jsonValue({ maxDepth: 1 }) })

  await issueCode(valid.mobile, 'a code')
  const property = fc.asyncProperty(anyBody, fc.boolean(), async (value, isReset) => {
    const json = JSON.stringify(value)
    const [status, errno, errmsg] = contract[expectedOutcome(JSON.parse(json))]
    const reply = await (isReset ? api.resetPassword(json) : api.signUp(json))
    assert.deepEqual([reply.statusCode, reply.json()], [status, { errno, errmsg }])
  })
  const tuples = [true, false].flatMap((isReset) =>
    examples.map((changes): [object, boolean] => [{ ...valid, ...changes }, isReset])
  )
  await fc.assert(property, { numRuns: tuples.length + 300, examples: tuples })
  t.equal(await redis.get(`sms_code_${valid.mobile}`), 'a code')
})

t.test('the plugin in a host application keeps its contract, and leaves the host alone', async (t) => {
  t.strictSame(Object.keys(library).sort(), ['ConfigError', 'buildApp', 'loadConfig', 'migrate', 'signUp'])
  const log: string[] = []
  const stream = { write: (line: string) => log.push(line) }
  // With Fastify's default Ajv, which coerces, and with stores, cookies and handlers of its own.
  const host = Fastify({ logger: { stream } })
  t.after(() => host.close())
  await host.register(fastifyCookie)
  await host.register(fastifyPostgres, { connectionString: stores.databaseUrl })
  await host.register(fastifyRedis, { url: stores.redisUrl })
  host.setErrorHandler((_error, _request, reply) => reply.code(418).send({ host: 'error' }))
  host.setNotFoundHandler((_request, reply) => reply.code(404).send({ host: 'not found' }))
  host.get('/fails', () => {
    throw new Error('the host fails')
  })
  const coerced = { type: 'object', properties: { n: { type: 'number' } } }
  host.post('/coerces', { schema: { body: coerced } }, ({ body }) => [body])
  await host.register(library.signUp, { prefix: '/auth', config: config({ LOG_LEVEL: 'silent' }) })
  const signUp = (payload: object) => host.inject({ method: 'POST', url: '/auth/users', payload })

  const reply = await signUp(await signUpBody())
  t.match([reply.statusCode, reply.json()], [201, { errno: '0', data: { session: true } }])
  const me = await host.inject({ url: '/auth/session', headers: { cookie: cookieOf(reply) } })
  t.equal(me.json().data.mobile, reply.json().data.mobile)
  checkRefusal(t, await signUp(await signUpBody({ mobile: 1 })), 'malformed_parameter', 'nothing is coerced')
  checkRefusal(t, await signUp({ password: 'x'.repeat(5_000) }), 'body_too_large')
  t.strictSame((await host.inject('/fails')).json(), { host: 'error' })
  t.strictSame((await host.inject('/nowhere')).json(), { host: 'not found' })
  const { payload } = await host.inject({ method: 'POST', url: '/coerces', payload: { n: '1' } })
  t.equal(payload, '[{"n":1}]', 'the host still coerces')

  log.length = 0
  for (const url of ['/auth/users', '/auth/sms_codes', '/auth/sessions']) {
    await host.inject({ method: 'POST', url, payload: {} })
  }
  t.equal(log.filter((line) => line.includes('request completed')).length, 3, 'the routes log at the level of the host')

  // G7, also if the host prints every field of an error.
  const body = await signUpBody()
  const key = `sms_code_${body.mobile}`
  await redis.del(key)
  // A command on a key of the wrong type fails with an error that contains the command.
  await redis.lpush(key, body.sms_code)
  checkRefusal(t, await signUp(body), 'internal_error')
  t.match(log.join(), 'WRONGTYPE')
  await redis.del(key)
  await redis.set(key, body.sms_code)
  await redis.config('SET', 'maxmemory', '1')
  checkRefusal(t, await signUp(body), 'storage_unavailable')
  await redis.config('SET', 'maxmemory', '0')
  t.match(log.join(), 'OOM')
  for (const secret of [body.mobile, body.sms_code]) t.notMatch(log.join(), secret, 'G7')
})
