/** The languages of `errmsg`, chosen by `Accept-Language`. */
export const languages = ['zh', 'en'] as const
export type Language = (typeof languages)[number]

interface Outcome extends Record<Language, string> {
  status: number
  errno: string
  /** The default of the `Retry-After` header, which every 429 and 503 carries. */
  retryAfterSeconds?: number
}

/**
 * Every answer of this service, and the only place of a status, an errno or a message.
 * `{min}` and `{max}` in a message are the bounds of a password's length, in characters.
 */
export const outcomes = {
  registered: { status: 201, errno: '0', zh: '注册成功', en: 'Registered' },
  logged_in: { status: 201, errno: '0', zh: '登录成功', en: 'Logged in' },
  code_sent: { status: 202, errno: '0', zh: '发送成功', en: 'Sent' },
  password_reset: { status: 200, errno: '0', zh: '密码已重置', en: 'Password reset' },
  healthy: { status: 200, errno: '0', zh: '成功', en: 'OK' },
  session_found: { status: 200, errno: '0', zh: '成功', en: 'OK' },
  logged_out: { status: 200, errno: '0', zh: '退出成功', en: 'Logged out' },
  account_deleted: { status: 200, errno: '0', zh: '注销成功', en: 'Account deleted' },
  missing_parameter: { status: 400, errno: '4103', zh: '参数不完整', en: 'A required parameter is missing' },
  malformed_parameter: { status: 400, errno: '4103', zh: '参数错误', en: 'Malformed parameter' },
  invalid_mobile: { status: 400, errno: '4103', zh: '手机号格式错误', en: 'Invalid mobile number' },
  passwords_differ: { status: 400, errno: '4103', zh: '两次密码不一致', en: 'The passwords differ' },
  password_length: {
    status: 400,
    errno: '4103',
    zh: '密码须为{min}至{max}个字符',
    en: 'The password must have {min} to {max} characters'
  },
  password_common: { status: 400, errno: '4103', zh: '密码过于常见', en: 'The password is too common' },
  body_too_large: { status: 413, errno: '4103', zh: '请求体过大', en: 'Body too large' },
  unsupported_content_type: { status: 415, errno: '4103', zh: '不支持的内容类型', en: 'Unsupported content type' },
  wrong_code: { status: 422, errno: '4004', zh: '短信验证码错误', en: 'Wrong SMS code' },
  mobile_registered: { status: 409, errno: '4003', zh: '手机号已存在', en: 'Mobile already registered' },
  not_logged_in: { status: 401, errno: '4101', zh: '用户未登录', en: 'Not logged in' },
  wrong_login: { status: 401, errno: '4102', zh: '用户名或密码错误', en: 'Wrong mobile or password' },
  no_such_route: { status: 404, errno: '4201', zh: '非法请求', en: 'No such route' },
  bad_request: { status: 400, errno: '4201', zh: '非法请求', en: 'Bad request' },
  too_many_requests: {
    status: 429,
    errno: '4201',
    zh: '请求过于频繁，请稍后重试',
    en: 'Too many requests',
    retryAfterSeconds: 60
  },
  storage_unavailable: {
    status: 503,
    errno: '4001',
    zh: '数据库异常',
    en: 'Storage unavailable',
    retryAfterSeconds: 1
  },
  busy: { status: 503, errno: '4500', zh: '服务繁忙，请稍后重试', en: 'Busy, try again', retryAfterSeconds: 1 },
  sms_gateway_unavailable: {
    status: 503,
    errno: '4301',
    zh: '第三方系统错误',
    en: 'SMS gateway unavailable',
    retryAfterSeconds: 5
  },
  internal_error: { status: 500, errno: '4500', zh: '内部错误', en: 'Internal error' }
} as const satisfies Record<string, Outcome>

export type OutcomeName = keyof typeof outcomes

/** All names, in the order of the table. */
export const outcomeNames = Object.keys(outcomes).filter((name): name is OutcomeName => name in outcomes)

/** What an answer may carry beside its status, errno and message. */
export interface OutcomeDetails {
  data?: object
  /** Another status of `bad_request`. */
  status?: number
  /** Whole seconds until the same request may succeed; replaces the default of the outcome. */
  retryAfterSeconds?: number | undefined
}

/**
 * An outcome as an error, for features and `http/`. The error handler answers with the outcome. The cause is logged and never
 * reaches the client.
 *
 * What stands below `http/` throws plain errors instead, which `http/replies.ts` maps to outcomes.
 */
export class Refusal extends Error {
  override readonly name = 'Refusal'

  constructor(
    readonly outcome: OutcomeName,
    cause?: unknown,
    readonly details: OutcomeDetails = {}
  ) {
    super(outcome, { cause })
  }
}
