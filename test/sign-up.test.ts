import { verify } from '@node-rs/argon2'
import t from 'tap'
import { outcomes } from '#src/outcomes.js'
import { client, statusAndErrno } from '../testkit/client.js'
import { claimKey, impatient, sessionIdOf, startTestbed } from '../testkit/testbed.js'

const {
  build,
  buildHashingAfter,
  cookieOf,
  holdInserts,
  holdRedisWrites,
  issueCode,
  newMobile,
  openProxy,
  redis,
  signUpBody,
  userRows
} = await startTestbed(t)

const app = await build(t)
const api = client(app)

t.test('201: the row is written, its hash verifies the password, and a session starts (G3)', async (t) => {
  const body = await signUpBody()
  const reply = await api.signUp(body)
  const [row] = await userRows(body.mobile)

  t.equal(reply.statusCode, 201)
  t.match(reply.headers['content-type'], /^application\/json/)
  t.strictSame(reply.json(), {
    errno: '0',
    errmsg: '注册成功',
    data: { user_id: row.id, name: body.mobile, mobile: body.mobile, session: true }
  })
  t.match(row, { name: body.mobile, mobile: body.mobile, password_hash: /^\$argon2id\$v=19\$m=64,t=1,p=1\$/ })
  t.ok(row.created_at instanceof Date)
  t.ok(await verify(row.password_hash, body.password))
  t.equal(await redis.exists(`sms_code_${body.mobile}`), 0, 'the code is used')
  t.strictSame(await redis.keys('*:epoch'), [], 'no sessions are ended')

  const sessionId = sessionIdOf(cookieOf(reply))
  t.match(JSON.parse((await redis.get(`session:${sessionId}`)) ?? ''), {
    user_id: row.id,
    name: body.mobile,
    mobile: body.mobile
  })
  const ttlSeconds = await redis.ttl(`session:${sessionId}`)
  t.ok(ttlSeconds > 86_300 && ttlSeconds <= 86_400, `${ttlSeconds} s`)
})

t.test('the hash has the configured memory and passes', async (t) => {
  const app = await build(t, { HASH_MEMORY_KIB: '128', HASH_PASSES: '3' })
  const body = await signUpBody()
  await client(app).signUp(body)
  const [row] = await userRows(body.mobile)
  t.match(row.password_hash, /^\$argon2id\$v=19\$m=128,t=3,p=1\$/)
})

t.test('only the hash uses the NFKC form of the password', async (t) => {
  // Full-width letters and a ligature: 8 characters as sent, 9 after NFKC.
  const password = 'ｆｕｌｌｗｄ1ﬁ'
  const body = await signUpBody({ password, password2: password })
  t.equal((await api.signUp(body)).statusCode, 201)
  const [row] = await userRows(body.mobile)
  t.ok(await verify(row.password_hash, 'fullwd1fi'))
  const sameAfterNfkc = await signUpBody({ password, password2: 'fullwd1fi' })
  t.equal((await api.signUp(sameAfterNfkc)).json().errmsg, '两次密码不一致')
})

t.test('unknown fields are ignored, also __proto__ and constructor', async (t) => {
  const valid = await signUpBody()
  const others = { id: 1, user_id: '7', name: 'other', created_at: 0, session_epoch: 9, constructor: { prototype: 1 } }
  const body = JSON.stringify({ ...valid, ...others })
  const reply = await api.signUp(body.replace('{', '{"__proto__": {"mobile": 1, "isPolluted": true}, '))
  t.equal(reply.statusCode, 201)
  const { mobile } = valid
  const [{ id, ...row }] = await userRows(mobile)
  t.notOk(['1', '7'].includes(id))
  t.match(row, { mobile, name: mobile, session_epoch: 0 })
  t.ok(row.created_at > new Date(0))
  t.strictSame(reply.json().data, { user_id: id, name: mobile, mobile, session: true })
  t.notOk('isPolluted' in {}, 'no prototype has changed')
})

/** Changes to a valid body, and the message: that of the first fault in the order of the outcome table. */
const invalidBodies: [string, Record<string, unknown>, string][] = [
  ['no mobile', { mobile: undefined }, '参数不完整'],
  ['a mobile that is null', { mobile: null }, '参数不完整'],
  ['an empty mobile', { mobile: '' }, '参数不完整'],
  ['no code', { sms_code: undefined }, '参数不完整'],
  ['a code that is null', { sms_code: null }, '参数不完整'],
  ['an empty code', { sms_code: '' }, '参数不完整'],
  ['no password', { password: undefined }, '参数不完整'],
  ['an empty password', { password: '' }, '参数不完整'],
  ['no password2', { password2: null }, '参数不完整'],
  ['absent before wrong type', { mobile: 13_800_000_000, password2: undefined }, '参数不完整'],
  ['null before an invalid mobile', { mobile: '1', sms_code: null }, '参数不完整'],
  ['a number as the mobile: nothing is coerced', { mobile: 13_800_000_000 }, '参数错误'],
  ['a number as the code', { sms_code: 123_456 }, '参数错误'],
  ['an array as the password', { password: ['a password'] }, '参数错误'],
  ['an object as the mobile', { mobile: {} }, '参数错误'],
  ['false as the code', { sms_code: false }, '参数错误'],
  ['a code of 65 characters', { sms_code: 'c'.repeat(65) }, '参数错误'],
  ['wrong type before an invalid mobile', { mobile: '1', password: 1 }, '参数错误'],
  ['too long before an invalid mobile', { mobile: '1', sms_code: 'c'.repeat(65) }, '参数错误'],
  ['a mobile of 10 digits', { mobile: '1380000000' }, '手机号格式错误'],
  ['a mobile of 12 digits', { mobile: '138000000000' }, '手机号格式错误'],
  ['a mobile that starts with 12', { mobile: '12800000000' }, '手机号格式错误'],
  ['a mobile and a line feed', { mobile: '13800000000\n' }, '手机号格式错误'],
  ['full-width digits', { mobile: '１３８０００００００００' }, '手机号格式错误'],
  ['a mobile and a NUL', { mobile: '13800000000\0' }, '手机号格式错误'],
  ['an invalid mobile before passwords that differ', { mobile: '1', password2: 'another' }, '手机号格式错误'],
  ['passwords that differ', { password2: 'another password' }, '两次密码不一致'],
  ['passwords that differ before short ones', { password: 'short', password2: 'shorter' }, '两次密码不一致'],
  ['7 characters', { password: 'sev3n&7', password2: 'sev3n&7' }, '密码须为8至128个字符'],
  ['7 code points in 14 UTF-16 units', { password: '😀'.repeat(7), password2: '😀'.repeat(7) }, '密码须为8至128个字符'],
  ['129 characters', { password: 'x'.repeat(129), password2: 'x'.repeat(129) }, '密码须为8至128个字符'],
  ['a short password before a common one', { password: '123456', password2: '123456' }, '密码须为8至128个字符'],
  ['a common password', { password: 'password', password2: 'password' }, '密码过于常见'],
  ['a common password in capitals', { password: 'QWERTYUIOP', password2: 'QWERTYUIOP' }, '密码过于常见'],
  [
    'a common password in full-width letters',
    { password: 'ｐａｓｓｗｏｒｄ', password2: 'ｐａｓｓｗｏｒｄ' },
    '密码过于常见'
  ]
]

t.test('400: a body is refused for its first fault, and the code stays', async (t) => {
  for (const [name, changes, errmsg] of invalidBodies) {
    const body = await signUpBody()
    const reply = await api.signUp({ ...body, ...changes })
    t.strictSame([reply.statusCode, reply.json()], [400, { errno: '4103', errmsg }], name)
    t.equal(await redis.get(`sms_code_${body.mobile}`), body.sms_code, 'the code stays')
  }
  const mobile = newMobile()
  const reply = await api.signUp(await signUpBody({ mobile, password: mobile, password2: mobile }))
  t.equal(reply.json().errmsg, '密码过于常见', 'a password equal to the mobile')
})

t.test('400: a body that is not JSON or not an object is malformed', async (t) => {
  for (const body of ['', '{', '{"mobile":}', 'null', '[]', '"text"', '1', 'true', '{}}', "{'mobile': 1}"]) {
    const reply = await api.signUp(body)
    t.strictSame([reply.statusCode, reply.json()], [400, { errno: '4103', errmsg: '参数错误' }], body)
  }
})

// Decoding would replace them all by the same character, so that different passwords would become one.
t.test('400: invalid UTF-8 and lone surrogates are malformed', async (t) => {
  const body = JSON.stringify(await signUpBody({ password: 'a password @', password2: 'a password @' }))
  for (const bytes of [[0xff], [0xc0, 0xaf], [0xed, 0xa0, 0x80]]) {
    const invalidBody = Buffer.from(body.replaceAll('@', Buffer.from(bytes).toString('latin1')), 'latin1')
    const reply = await api.signUp(invalidBody)
    t.strictSame([reply.statusCode, reply.json().errmsg], [400, '参数错误'])
  }
  const reply = await api.signUp(body.replaceAll('@', '\\ud800'))
  t.strictSame([reply.statusCode, reply.json().errmsg], [400, '参数错误'])
})

// NFKC of another Unicode version may change them: then the password would be another one under another Node.js.
t.test('400: a new password with an unassigned code point is malformed, and the code stays', async (t) => {
  const { mobile } = await signUpBody()
  for (const character of ['\u0378', '\u{1ffff}', '\ufdd0', '\u{e01f0}', '\u{10ffff}', '\u{2fe0}']) {
    const password = `a password ${character}`
    const body = await signUpBody({ mobile, password, password2: password })
    for (const send of [api.signUp, api.resetPassword]) {
      const reply = await send(body)
      t.strictSame([reply.statusCode, reply.json().errmsg], [400, '参数错误'], `${character.codePointAt(0)}`)
    }
    t.equal((await api.signUp({ ...body, mobile: '1' })).json().errmsg, '参数错误', 'before an invalid mobile')
    t.equal(await redis.get(`sms_code_${mobile}`), body.sms_code)
    t.equal((await api.logIn({ mobile, password })).statusCode, 401, 'a login checks no more than the length')
    await redis.del(`login_failures:{${mobile}}:127.0.0.1`)
  }
  for (const character of ['\ue000', '\u{10fffd}', '\u{20000}', '\u{1f600}', '\n', '\0', '\u200d', '\u0301']) {
    const password = `a password ${character}`
    const body = await signUpBody({ password, password2: password })
    t.equal((await api.signUp(body)).statusCode, 201, `${character.codePointAt(0)}`)
    t.equal((await api.logIn({ mobile: body.mobile, password })).statusCode, 201)
  }
})

t.test('passwords of 8 and of 128 code points are accepted', async (t) => {
  for (const password of ['😀'.repeat(8), '😀'.repeat(128)]) {
    t.equal((await api.signUp(await signUpBody({ password, password2: password }))).statusCode, 201)
  }
})

t.test('PASSWORD_MIN sets the shortest password and the number in the message', async (t) => {
  const app = await build(t, { PASSWORD_MIN: '12' })
  const password = 'eleven char'
  const reply = await client(app).signUp(await signUpBody({ password, password2: password }))
  t.strictSame([reply.statusCode, reply.json().errmsg], [400, '密码须为12至128个字符'])
})

t.test('422: an absent, wrong or used code is refused, and a wrong one leaves the right one', async (t) => {
  const wrongCode = { errno: '4004', errmsg: '短信验证码错误' }

  const absent = await signUpBody()
  await redis.del(`sms_code_${absent.mobile}`)
  const replies = [await api.signUp(absent)]

  const guessed = await signUpBody()
  replies.push(await api.signUp({ ...guessed, sms_code: 'wrong' }))
  t.strictSame(await userRows(guessed.mobile), [])
  t.equal((await api.signUp(guessed)).statusCode, 201)

  const used = await signUpBody()
  await api.signUp(used)
  const withoutCode = await signUpBody({ mobile: used.mobile })
  await redis.del(`sms_code_${used.mobile}`)
  replies.push(await api.signUp(withoutCode))

  for (const reply of replies) t.strictSame([reply.statusCode, reply.json()], [422, wrongCode])
  t.strictSame(await userRows(absent.mobile), [])
})

t.test('409: a registered mobile is refused, and its first password stays', async (t) => {
  const first = await signUpBody()
  await api.signUp(first)
  const [row] = await userRows(first.mobile)
  const reply = await api.signUp(await signUpBody({ mobile: first.mobile }))
  t.strictSame([reply.statusCode, reply.json()], [409, { errno: '4003', errmsg: '手机号已存在' }])
  t.strictSame(await userRows(first.mobile), [row])
  t.equal(reply.cookies.length, 0, 'and nobody is logged in')
})

t.test('413: a body over 4 KiB is refused, one of 4 KiB is accepted', async (t) => {
  const body = JSON.stringify(await signUpBody())
  t.equal((await api.signUp(body.padEnd(4096))).statusCode, 201)
  const reply = await api.signUp(body.padEnd(4097))
  t.strictSame([reply.statusCode, reply.json()], [413, { errno: '4103', errmsg: '请求体过大' }])
})

t.test('415: every content type but application/json is refused', async (t) => {
  for (const type of [
    'text/plain',
    'application/x-www-form-urlencoded',
    'multipart/form-data; boundary=x',
    ';;',
    'json'
  ]) {
    const reply = await api.signUp(await signUpBody(), { headers: { 'content-type': type } })
    t.strictSame([reply.statusCode, reply.json()], [415, { errno: '4103', errmsg: '不支持的内容类型' }], type)
  }
  const headers = { 'content-type': 'application/json; charset=utf-8' }
  t.equal((await api.signUp(await signUpBody(), { headers })).statusCode, 201)
})

t.test('404: an unknown route or method is refused, also with a content type that is not supported', async (t) => {
  for (const [method, url] of [
    ['GET', '/'],
    ['GET', '/api/v1.0/users'],
    ['PUT', '/api/v1.0/users'],
    ['POST', '/api/v1.0/users/'],
    ['POST', '/users'],
    ['OPTIONS', '/api/v1.0/users']
  ] as const) {
    const reply = await app.inject({ method, url, headers: { 'content-type': 'text/plain' } })
    t.strictSame([reply.statusCode, reply.json()], [404, { errno: '4201', errmsg: '非法请求' }], `${method} ${url}`)
  }
})

t.test('503 4001: Redis does not answer within STORE_TIMEOUT_MS', async (t) => {
  const app = await build(t, impatient)
  const body = await signUpBody()
  const writes = await holdRedisWrites(t)
  const reply = await client(app).signUp(body)
  await writes.release()
  t.strictSame([reply.statusCode, reply.json()], [503, { errno: '4001', errmsg: '数据库异常' }])
  t.equal(reply.headers['retry-after'], '1')
})

t.test('503 4001: Postgres does not answer within STORE_TIMEOUT_MS, and nothing is written', async (t) => {
  const app = await build(t, impatient)
  const body = await signUpBody()
  const inserts = await holdInserts(t)
  const reply = await client(app).signUp(body)
  // Otherwise the INSERT might commit in the moment between the timeout of the service and that of Postgres.
  await inserts.arrived(0)
  await inserts.release()
  t.strictSame([reply.statusCode, reply.json()], [503, { errno: '4001', errmsg: '数据库异常' }])
  t.equal(reply.headers['retry-after'], '1')
  const claim = JSON.parse((await redis.get(claimKey(body.mobile))) ?? '{}')
  t.equal(claim.may_have_written, true, 'the INSERT was sent')
  t.strictSame(await userRows(body.mobile), [])
})

t.test('201 with session false and without a cookie: Redis fails after the row is committed', async (t) => {
  const proxy = await openProxy(t, 'REDIS_URL')
  const app = await build(t, { REDIS_URL: proxy.url, ...impatient })
  const body = await signUpBody()
  proxy.strike('session:', { kind: 'stall' })
  const reply = await client(app).signUp(body)
  t.equal(reply.statusCode, 201)
  t.match(reply.json(), { errno: '0', data: { mobile: body.mobile, session: false } })
  t.equal(reply.headers['set-cookie'], undefined)
  t.equal((await userRows(body.mobile)).length, 1)
})

t.test('500: the reply tells nothing about the cause of a bug', async (t) => {
  const app = await buildHashingAfter(t, () => Promise.reject(new Error('a secret cause')))
  const reply = await client(app).signUp(await signUpBody())
  t.strictSame([reply.statusCode, reply.json()], [500, { errno: '4500', errmsg: '内部错误' }])
})

t.test('Accept-Language chooses zh or en, and DEFAULT_LANGUAGE is the fallback', async (t) => {
  const chinese = '参数错误'
  const english = 'Malformed parameter'
  for (const [header, errmsg] of [
    ['en', english],
    ['en-US,en;q=0.9,zh;q=0.5', english],
    ['zh-CN,zh;q=0.9,en;q=0.8', chinese],
    ['en;q=0.1, zh;q=0.2', chinese],
    ['fr, en;q=0.1', english],
    ['fr', chinese],
    ['*', chinese],
    ['', chinese],
    [';;;q=x', chinese]
  ] as const) {
    const reply = await api.signUp('1', { headers: { 'accept-language': header } })
    t.equal(reply.json().errmsg, errmsg, header)
  }
  const inEnglish = client(await build(t, { DEFAULT_LANGUAGE: 'en' }))
  t.equal((await inEnglish.signUp('1')).json().errmsg, english)
  t.equal((await inEnglish.signUp('1', { headers: { 'accept-language': 'zh' } })).json().errmsg, chinese)
  t.equal((await inEnglish.signUp(await signUpBody())).json().errmsg, outcomes.registered.en)
})

t.test('LEGACY_STATUS sends every outcome with status 200', async (t) => {
  const app = await build(t, { LEGACY_STATUS: 'true' })
  const body = await signUpBody()
  const replies = [
    await client(app).signUp(body),
    await client(app).signUp({ ...body, sms_code: 'wrong' }),
    await client(app).signUp({ ...body, sms_code: await issueCode(body.mobile) }),
    await client(app).signUp('{'),
    await client(app).signUp({}),
    await client(app).signUp(body, { headers: { 'content-type': 'text/plain' } }),
    await client(app).signUp(' '.repeat(5_000)),
    await app.inject('/api/v1.0/session'),
    await app.inject('/nowhere')
  ]
  t.strictSame(
    replies.map(statusAndErrno),
    ['0', '4004', '4003', '4103', '4103', '4103', '4103', '4101', '4201'].map((errno) => [200, errno])
  )
  t.equal(replies[0]?.json().data.mobile, body.mobile)
})

t.test('API_PREFIX moves the routes', async (t) => {
  const app = await build(t, { API_PREFIX: '/' })
  const reply = await app.inject({ method: 'POST', url: '/users', payload: await signUpBody() })
  t.equal(reply.statusCode, 201)
})
