import { verify } from '@node-rs/argon2'
import Fastify from 'fastify'
import t from 'tap'
import { envelope } from '../src/http/envelope.js'
import { outcomes } from '../src/outcomes.js'
import {
  build,
  cookieOf,
  holdInserts,
  holdRedisWrites,
  issueCode,
  newMobile,
  post,
  postgres,
  redis,
  signUpBody,
  testConfig,
  until,
  userRow
} from './helper.js'

t.test('201: a durable row whose hash verifies the password, and a session (G3)', async (t) => {
  const app = await build(t)
  const body = await signUpBody()
  const reply = await post(app, body)
  const [row] = await userRow(body.mobile)

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

  const sessionId = cookieOf(reply).split(/[=.]/)[1]
  t.match(JSON.parse((await redis.get(`session:${sessionId}`)) ?? ''), {
    user_id: row.id,
    name: body.mobile,
    mobile: body.mobile
  })
  t.equal(await redis.ttl(`session:${sessionId}`), 86_400)
})

t.test('the hash has the configured memory and passes', async (t) => {
  const app = await build(t, { HASH_MEMORY_KIB: '128', HASH_PASSES: '3' })
  const body = await signUpBody()
  await post(app, body)
  const [row] = await userRow(body.mobile)
  t.match(row.password_hash, /^\$argon2id\$v=19\$m=128,t=3,p=1\$/)
})

t.test('NFKC feeds the hash, and only the hash', async (t) => {
  const app = await build(t)
  // Full-width letters and a ligature; 8 characters as sent, 9 after NFKC.
  const password = 'ｆｕｌｌｗｄ1ﬁ'
  const body = await signUpBody({ password, password2: password })
  t.equal((await post(app, body)).statusCode, 201)
  const [row] = await userRow(body.mobile)
  t.ok(await verify(row.password_hash, 'fullwd1fi'))
  t.equal((await post(app, await signUpBody({ password, password2: 'fullwd1fi' }))).json().errmsg, '两次密码不一致')
})

t.test('unknown extra fields are ignored, harmless ones and dangerous ones', async (t) => {
  const app = await build(t)
  const body = JSON.stringify({ ...(await signUpBody()), id: 1, user_id: 7, constructor: { prototype: 1 } })
  const reply = await post(app, body.replace('{', '{"__proto__": {"mobile": 1}, '))
  t.equal(reply.statusCode, 201)
})

/** Bodies with more than one fault: the first in the table's order is told. */
const refusedBodies: [string, Record<string, unknown>, string][] = [
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
  ['a number for a mobile: nothing is coerced', { mobile: 13_800_000_000 }, '参数错误'],
  ['a number for a code', { sms_code: 123_456 }, '参数错误'],
  ['an array for a password', { password: ['a password'] }, '参数错误'],
  ['an object for a mobile', { mobile: {} }, '参数错误'],
  ['false for a code', { sms_code: false }, '参数错误'],
  ['a code of 17 characters', { sms_code: 'c'.repeat(17) }, '参数错误'],
  ['wrong type before an invalid mobile', { mobile: '1', password: 1 }, '参数错误'],
  ['too long before an invalid mobile', { mobile: '1', sms_code: 'c'.repeat(17) }, '参数错误'],
  ['a mobile of 10 digits', { mobile: '1380000000' }, '手机号格式错误'],
  ['a mobile of 12 digits', { mobile: '138000000000' }, '手机号格式错误'],
  ['a mobile that starts with 12', { mobile: '12800000000' }, '手机号格式错误'],
  ['a mobile and a line feed', { mobile: '13800000000\n' }, '手机号格式错误'],
  ['full-width digits', { mobile: '１３８０００００００００' }, '手机号格式错误'],
  ['a mobile and a NUL', { mobile: '13800000000\0' }, '手机号格式错误'],
  ['an invalid mobile before passwords that differ', { mobile: '1', password2: 'another' }, '手机号格式错误'],
  ['passwords that differ', { password2: 'another password' }, '两次密码不一致'],
  ['differing before short', { password: 'short', password2: 'shorter' }, '两次密码不一致'],
  ['7 characters', { password: 'sev3n&7', password2: 'sev3n&7' }, '密码须为8至128个字符'],
  ['7 code points in 14 units', { password: '😀'.repeat(7), password2: '😀'.repeat(7) }, '密码须为8至128个字符'],
  ['129 characters', { password: 'x'.repeat(129), password2: 'x'.repeat(129) }, '密码须为8至128个字符'],
  ['short before common', { password: '123456', password2: '123456' }, '密码须为8至128个字符'],
  ['a common password', { password: 'password', password2: 'password' }, '密码过于常见'],
  ['a common password in capitals', { password: 'QWERTYUIOP', password2: 'QWERTYUIOP' }, '密码过于常见']
]

t.test('400: a body is refused for its first fault, and no store is touched', async (t) => {
  const app = await build(t)
  for (const [name, changes, errmsg] of refusedBodies) {
    const body = await signUpBody()
    const reply = await post(app, { ...body, ...changes })
    t.strictSame([reply.statusCode, reply.json()], [400, { errno: '4103', errmsg }], name)
    t.equal(await redis.get(`sms_code_${body.mobile}`), body.sms_code, 'the code stays')
  }
  const mobile = newMobile()
  const reply = await post(app, await signUpBody({ mobile, password: mobile, password2: mobile }))
  t.equal(reply.json().errmsg, '密码过于常见', 'a password equal to the mobile')
})

t.test('400: what is not JSON or not an object', async (t) => {
  const app = await build(t)
  for (const body of ['', '{', '{"mobile":}', 'null', '[]', '"text"', '1', 'true', '{}}', "{'mobile': 1}"]) {
    const reply = await post(app, body)
    t.strictSame([reply.statusCode, reply.json()], [400, { errno: '4103', errmsg: '参数错误' }], body)
  }
})

t.test('400: what is not UTF-8, or half a character, is no text: it would make one password of many', async (t) => {
  const app = await build(t)
  const body = JSON.stringify(await signUpBody({ password: 'a password @', password2: 'a password @' }))
  for (const bytes of [[0xff], [0xc0, 0xaf], [0xed, 0xa0, 0x80]]) {
    const reply = await post(app, Buffer.from(body.replaceAll('@', Buffer.from(bytes).toString('latin1')), 'latin1'))
    t.strictSame([reply.statusCode, reply.json().errmsg], [400, '参数错误'])
  }
  const reply = await post(app, body.replaceAll('@', '\\ud800'))
  t.strictSame([reply.statusCode, reply.json().errmsg], [400, '参数错误'])
})

t.test('lengths count code points: 8 and 128 are enough and not too many', async (t) => {
  const app = await build(t)
  for (const password of ['😀'.repeat(8), '😀'.repeat(128)]) {
    t.equal((await post(app, await signUpBody({ password, password2: password }))).statusCode, 201)
  }
})

t.test('PASSWORD_MIN is the least length, and its message says so', async (t) => {
  const app = await build(t, { PASSWORD_MIN: '12' })
  const password = 'eleven char'
  const reply = await post(app, await signUpBody({ password, password2: password }))
  t.strictSame([reply.statusCode, reply.json().errmsg], [400, '密码须为12至128个字符'])
})

t.test('422: a code that is absent, wrong or used; the first wrong guess uses it up', async (t) => {
  const app = await build(t)
  const wrongCode = { errno: '4004', errmsg: '短信验证码错误' }

  const absent = await signUpBody()
  await redis.del(`sms_code_${absent.mobile}`)
  const replies = [await post(app, absent)]

  const wrong = await signUpBody()
  replies.push(await post(app, { ...wrong, sms_code: 'wrong' }))
  replies.push(await post(app, wrong))

  const used = await signUpBody()
  await post(app, used)
  const other = await signUpBody({ mobile: used.mobile })
  await redis.del(`sms_code_${used.mobile}`)
  replies.push(await post(app, other))

  for (const reply of replies) t.strictSame([reply.statusCode, reply.json()], [422, wrongCode])
  t.strictSame([await userRow(absent.mobile), await userRow(wrong.mobile)], [[], []])
})

t.test('409: the mobile is registered; the first password stays', async (t) => {
  const app = await build(t)
  const first = await signUpBody()
  await post(app, first)
  const [row] = await userRow(first.mobile)
  const reply = await post(app, await signUpBody({ mobile: first.mobile }))
  t.strictSame([reply.statusCode, reply.json()], [409, { errno: '4003', errmsg: '手机号已存在' }])
  t.strictSame(await userRow(first.mobile), [row])
  t.equal(reply.cookies.length, 0, 'and nobody is logged in')
})

t.test('413: a body over 4 KiB; 4 KiB are enough', async (t) => {
  const app = await build(t)
  const body = JSON.stringify(await signUpBody())
  t.equal((await post(app, body.padEnd(4096))).statusCode, 201)
  const reply = await post(app, body.padEnd(4097))
  t.strictSame([reply.statusCode, reply.json()], [413, { errno: '4103', errmsg: '请求体过大' }])
})

t.test('415: anything but application/json', async (t) => {
  const app = await build(t)
  for (const type of [
    'text/plain',
    'application/x-www-form-urlencoded',
    'multipart/form-data; boundary=x',
    ';;',
    'json'
  ]) {
    const reply = await post(app, await signUpBody(), { 'content-type': type })
    t.strictSame([reply.statusCode, reply.json()], [415, { errno: '4103', errmsg: '不支持的内容类型' }], type)
  }
  const reply = await post(app, await signUpBody(), { 'content-type': 'application/json; charset=utf-8' })
  t.equal(reply.statusCode, 201)
})

t.test('404: an unknown route or method, whatever its body', async (t) => {
  const app = await build(t)
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

t.test('503 4001: Redis does not answer in STORE_TIMEOUT_MS', async (t) => {
  const app = await build(t, { STORE_TIMEOUT_MS: '100' })
  const body = await signUpBody()
  const writes = await holdRedisWrites()
  const reply = await post(app, body)
  await writes.release()
  t.strictSame([reply.statusCode, reply.json()], [503, { errno: '4001', errmsg: '数据库异常' }])
  t.equal(reply.headers['retry-after'], '1')
})

t.test(
  'a Redis connection on which a command has timed out is dropped, and the next request has a new one',
  async (t) => {
    const connectionsOfService = async () => {
      const own = await redis.client('ID')
      const list = String(await redis.client('LIST'))
      return [...list.matchAll(/^id=(\d+) /gm)].map(([, id]) => Number(id)).filter((id) => id !== own)
    }
    const before = await connectionsOfService()
    const app = await build(t, { STORE_TIMEOUT_MS: '100' })
    const [connection] = (await connectionsOfService()).filter((id) => !before.includes(id))
    const body = await signUpBody()
    const writes = await holdRedisWrites()
    t.equal((await post(app, body)).statusCode, 503)
    await writes.release()
    await until(async () => !(await connectionsOfService()).includes(connection ?? 0))
    const again = await signUpBody()
    await until(async () => (await post(app, again)).statusCode === 201)
  }
)

t.test('an idle Postgres connection that dies does not end the process', async (t) => {
  const app = await build(t)
  t.equal((await post(app, await signUpBody())).statusCode, 201)
  const { rowCount } = await postgres.query(
    `SELECT pg_terminate_backend(pid, 1000) FROM pg_stat_activity WHERE application_name = 'mobile-signup'`
  )
  t.ok(rowCount)
  const body = await signUpBody()
  await until(async () => {
    const reply = await post(app, body)
    if (reply.statusCode === 503) await issueCode(body.mobile, body.sms_code)
    return reply.statusCode === 201
  })
})

t.test('503 4001: Postgres does not answer in STORE_TIMEOUT_MS, and nothing is written', async (t) => {
  const app = await build(t, { STORE_TIMEOUT_MS: '100' })
  const body = await signUpBody()
  const inserts = await holdInserts()
  const reply = await post(app, body)
  await inserts.release()
  t.strictSame([reply.statusCode, reply.json()], [503, { errno: '4001', errmsg: '数据库异常' }])
  t.equal(reply.headers['retry-after'], '1')
  t.strictSame(await userRow(body.mobile), [])
})

t.test('201 with session false and no cookie: the row is there and Redis is not', async (t) => {
  const app = await build(t, { STORE_TIMEOUT_MS: '400' })
  const body = await signUpBody()
  const inserts = await holdInserts()
  const pending = post(app, body)
  await inserts.arrived(1)
  const writes = await holdRedisWrites()
  await inserts.release()
  const reply = await pending
  await writes.release()
  t.equal(reply.statusCode, 201)
  t.match(reply.json(), { errno: '0', data: { mobile: body.mobile, session: false } })
  t.equal(reply.headers['set-cookie'], undefined)
  t.equal((await userRow(body.mobile)).length, 1)
})

t.test('500: a bug tells nothing of its cause', async (t) => {
  const app = Fastify()
  t.after(() => app.close())
  await app.register(envelope, testConfig())
  app.get('/', () => {
    throw new Error('a secret cause')
  })
  const reply = await app.inject('/')
  t.strictSame([reply.statusCode, reply.json()], [500, { errno: '4500', errmsg: '内部错误' }])
})

t.test('Accept-Language chooses between zh and en, and DEFAULT_LANGUAGE where it does not', async (t) => {
  const chinese = '参数错误'
  const english = 'Malformed parameter'
  const app = await build(t)
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
    t.equal((await post(app, '1', { 'accept-language': header })).json().errmsg, errmsg, header)
  }
  const inEnglish = await build(t, { DEFAULT_LANGUAGE: 'en' })
  t.equal((await post(inEnglish, '1')).json().errmsg, english)
  t.equal((await post(inEnglish, '1', { 'accept-language': 'zh' })).json().errmsg, chinese)
  const body = await signUpBody()
  t.equal((await post(inEnglish, body)).json().errmsg, outcomes.registered.en)
})

t.test('LEGACY_STATUS sends every outcome with status 200', async (t) => {
  const app = await build(t, { LEGACY_STATUS: 'true' })
  const body = await signUpBody()
  const replies = [
    await post(app, body),
    await post(app, { ...body, sms_code: 'wrong' }),
    await post(app, { ...body, sms_code: await issueCode(body.mobile) }),
    await post(app, '{'),
    await post(app, {}),
    await post(app, body, { 'content-type': 'text/plain' }),
    await post(app, ' '.repeat(5_000)),
    await app.inject('/api/v1.0/session'),
    await app.inject('/nowhere')
  ]
  t.strictSame(
    replies.map((reply) => [reply.statusCode, reply.json().errno]),
    ['0', '4004', '4003', '4103', '4103', '4103', '4103', '4101', '4201'].map((errno) => [200, errno])
  )
  t.equal(replies[0]?.json().data.mobile, body.mobile)
})

t.test('API_PREFIX moves the routes', async (t) => {
  const app = await build(t, { API_PREFIX: '/' })
  const reply = await app.inject({ method: 'POST', url: '/users', payload: await signUpBody() })
  t.equal(reply.statusCode, 201)
})
