import Fastify from 'fastify'
import t from 'tap'
import { loadConfig } from '#src/config/config.js'
import { replies } from '#src/http/replies.js'
import { type OutcomeName, outcomeNames, Refusal } from '#src/outcomes.js'

/*
 * The outcome table. The copy here comes from docs/api.md, not from src, so a change of src fails the test.
 */

const config = loadConfig({ DATABASE_URL: 'postgresql://u:p@host/db', REDIS_URL: 'redis://host' })

/** The outcome table of docs/api.md. */
const contract: Record<OutcomeName, [status: number, errno: string, zh: string, en: string]> = {
  registered: [201, '0', '注册成功', 'Registered'],
  logged_in: [201, '0', '登录成功', 'Logged in'],
  code_sent: [202, '0', '发送成功', 'Sent'],
  password_reset: [200, '0', '密码已重置', 'Password reset'],
  healthy: [200, '0', '成功', 'OK'],
  session_found: [200, '0', '成功', 'OK'],
  logged_out: [200, '0', '退出成功', 'Logged out'],
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

t.test('every outcome has the status, errno and messages of the contract; 429 and 503 have Retry-After', async (t) => {
  for (const legacyStatus of [false, true]) {
    const app = Fastify()
    t.after(() => app.close())
    await app.register(replies, { config: { ...config, legacyStatus } })
    app.get<{ Params: { name: OutcomeName } }>('/:name', ({ params }, reply) => reply.outcome(params.name))
    for (const [name, [status, errno, zh, en]] of Object.entries(contract)) {
      for (const [language, errmsg] of [
        ['zh', zh],
        ['en', en]
      ]) {
        const reply = await app.inject({ url: `/${name}`, headers: { 'accept-language': language } })
        const expectedStatus = legacyStatus && name !== 'bad_request' ? 200 : status
        t.strictSame([reply.statusCode, reply.json()], [expectedStatus, { errno, errmsg }], name)
        const hasRetryAfter = /^[1-9]\d*$/.test(`${reply.headers['retry-after']}`)
        t.equal(hasRetryAfter, [429, 503].includes(status), name)
      }
    }
  }
})

t.test('the names of the outcomes are those of the table, in its order', async (t) => {
  t.strictSame(outcomeNames, Object.keys(contract))
})

t.test('a refusal has an outcome, a cause for the log, and details for the reply', async (t) => {
  const cause = new Error('the cause')
  const refusal = new Refusal('busy', cause, { retryAfterSeconds: 3 })
  t.match(refusal, { name: 'Refusal', message: 'busy', outcome: 'busy', cause, details: { retryAfterSeconds: 3 } })
  t.strictSame(new Refusal('busy').details, {})
})
