import assert from 'node:assert/strict'
import { randomInt } from 'node:crypto'
import fc from 'fast-check'
import Fastify from 'fastify'
import t from 'tap'
import { type Attempt, codes } from '../src/codes/codes.js'
import { ConfigError, loadConfig } from '../src/config/config.js'
import { envelope } from '../src/http/envelope.js'
import { type OutcomeName, outcomes } from '../src/outcomes.js'
import { redis as redisPlugin } from '../src/stores/redis.js'
import { build, post, redis, testConfig } from './helper.js'

/* The pure parts against models that were written from the design alone, and the take of a code against its own. */

/** Section 2 of the design: the first fault in the table's order. */
function modelOfValidation(body: unknown): OutcomeName {
  if (typeof body !== 'object' || body === null || Array.isArray(body)) return 'malformed_parameter'
  const fields = new Map(Object.entries(body))
  const values = ['mobile', 'sms_code', 'password', 'password2'].map((name) => fields.get(name))
  if (values.some((value) => value === undefined || value === null || value === '')) return 'missing_parameter'
  const texts = values.filter((value) => typeof value === 'string')
  const [mobile = '', code = '', password = '', password2] = texts
  if (texts.length < 4 || [...code].length > 16) return 'malformed_parameter'
  if (texts.some((text) => /\p{Surrogate}/u.test(text))) return 'malformed_parameter'
  if (mobile.length !== 11 || !/^1[3-9]/.test(mobile) || /[^0-9]/.test(mobile)) return 'invalid_mobile'
  if (password !== password2) return 'passwords_differ'
  if ([...password].length < 8 || [...password].length > 128) return 'password_length'
  if (password === mobile || ['password', '12345678', 'iloveyou'].includes(password.toLowerCase()))
    return 'password_common'
  return 'wrong_code'
}

t.test('validation tells what a model tells that was written from the design', async (t) => {
  const app = await build(t)
  const password = fc.oneof(
    fc.constantFrom(
      'password',
      'Password',
      '12345678',
      '13900001111',
      'ｐａｓｓｗｏｒｄ１',
      '密码密码密码密码',
      '𠮷𠮷𠮷𠮷𠮷𠮷𠮷',
      '\ud800 is half'
    ),
    // No digit or letter alone: what is common among them is not for the model to know.
    fc.string({ minLength: 5, maxLength: 12, unit: 'grapheme' }).map((text) => `${text}§`),
    fc.integer({ min: 126, max: 130 }).map((length) => '§'.repeat(length))
  )
  const anything = fc.oneof(fc.constantFrom('', null, undefined), fc.jsonValue({ maxDepth: 1 }))
  const or = <T>(usual: fc.Arbitrary<T>) =>
    fc.oneof({ weight: 8, arbitrary: usual }, { weight: 1, arbitrary: anything })
  const mobile = fc.oneof(
    fc.constantFrom(
      '13900001111',
      '12900001111',
      '139000011110',
      '１３９００００１１１１',
      '1390000111a',
      '13900001111\n'
    )
  )
  const body = fc
    .record({
      mobile: or(mobile),
      sms_code: or(fc.string({ minLength: 1, maxLength: 18 })),
      password: or(password),
      password2: or(password)
    })
    .chain((fields) => fc.boolean().map((same) => (same ? { ...fields, password2: fields.password, more: 1 } : fields)))
  await fc.assert(
    fc.asyncProperty(
      fc.oneof({ weight: 20, arbitrary: body }, { weight: 1, arbitrary: fc.jsonValue({ maxDepth: 1 }) }),
      async (value) => {
        const sent = JSON.parse(JSON.stringify(value))
        const expected = outcomes[modelOfValidation(sent)]
        const reply = await post(app, JSON.stringify(value))
        const told = reply.json()
        if (reply.statusCode !== expected.status || told.errno !== expected.errno) return false
        return told.errmsg === expected.zh.replace('{min}', '8').replace('{max}', '128')
      }
    ),
    { numRuns: 2_000 }
  )
})

/** Section 2 of the design, as it stands there. */
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

t.test(
  'every outcome has the status, errno and message of the design; 429 and 503 say when to ask again',
  async (t) => {
    for (const legacyStatus of [false, true]) {
      const app = Fastify()
      t.after(() => app.close())
      await app.register(envelope, { ...testConfig(), legacyStatus })
      app.get<{ Params: { name: OutcomeName } }>('/:name', ({ params }, reply) => reply.outcome(params.name))
      for (const [name, [status, errno, zh, en]] of Object.entries(contract)) {
        for (const [language, errmsg] of [
          ['zh', zh],
          ['en', en]
        ]) {
          const reply = await app.inject({ url: `/${name}`, headers: { 'accept-language': language } })
          const expected = [legacyStatus && name !== 'bad_request' ? 200 : status, { errno, errmsg }]
          t.strictSame([reply.statusCode, reply.json()], expected, name)
          t.equal(/^[1-9]\d*$/.test(`${reply.headers['retry-after']}`), [429, 503].includes(status), name)
        }
      }
    }
  }
)

t.test(
  'the configuration takes what it lists, and names every variable that it does not, without a secret',
  async () => {
    const integers = {
      PORT: [0, 65_535],
      PASSWORD_MIN: [1, 128],
      HASH_MEMORY_KIB: [8, 4_194_304],
      HASH_PASSES: [1, 1_000],
      HASH_THREADS: [1, 1_024],
      HASH_MAX_WAIT_MS: [0, 600_000],
      PG_POOL_MAX: [1, 1_000],
      STORE_TIMEOUT_MS: [1, 60_000],
      SMS_CODE_ATTEMPTS: [1, 1_000]
    } as const
    const camel = (name: string) => name.toLowerCase().replace(/_(.)/g, (_, letter: string) => letter.toUpperCase())
    const urls = { DATABASE_URL: 'postgresql://u:pass-word@host/db', REDIS_URL: 'redis://:pass-word@host/1' }
    const text = fc.oneof(
      fc.string({ maxLength: 8 }),
      fc.integer().map(String),
      fc.constantFrom('1e3', '0x10', ' 5', '5 ', '１')
    )
    await fc.assert(
      fc.property(
        fc.record(Object.fromEntries(Object.keys(integers).map((name) => [name, text])), { requiredKeys: [] }),
        (env) => {
          const bad = Object.entries(integers).filter(([name, [min, max]]) => {
            const value = env[name]
            return value && !(/^-?\d+$/.test(value) && Number(value) >= min && Number(value) <= max)
          })
          try {
            const config = new Map(Object.entries(loadConfig({ ...urls, ...env })))
            return (
              bad.length === 0 &&
              Object.entries(env).every(([name, value]) => value === '' || config.get(camel(name)) === Number(value))
            )
          } catch (error) {
            if (!(error instanceof ConfigError)) throw error
            const named = error.faults.map((fault) => fault.split(':')[0])
            return (
              named.sort().join() ===
                bad
                  .map(([name]) => name)
                  .sort()
                  .join() && !error.message.includes('pass-word')
            )
          }
        }
      ),
      { numRuns: 2_000 }
    )
  }
)

/** The protocol of docs/guarantees.md for one mobile, with time that stands still until a step says otherwise. */
class ModelOfTakes {
  code: string | undefined
  marker:
    | {
        state?: 'pending' | 'unknown' | 'done'
        code?: string
        owner?: number
        guesses: number
        of?: string | undefined
      }
    | undefined
  private takes = 0

  constructor(private readonly attempts: number) {}

  take(presented: string): { state: string; again?: boolean; owner?: number } {
    const { code, marker } = this
    const known = marker?.state !== undefined && marker.code === presented
    if (code !== presented && known && marker.state === 'done') return { state: 'done' }
    if (code !== presented && known && marker.state === 'pending') return { state: 'in_progress' }
    if (code === presented || known) {
      if (code === presented) this.code = undefined
      this.marker = { ...this.counted(code), state: 'pending', code: presented, owner: ++this.takes }
      return { state: 'taken', again: known, owner: this.takes }
    }
    if (code === undefined && (marker?.state ?? 'done') === 'done') return { state: 'wrong' }
    const counted = this.counted(code)
    counted.guesses++
    this.marker = counted
    if (counted.guesses < this.attempts) return { state: 'wrong' }
    this.code = undefined
    this.marker = marker?.state === 'done' ? marker : undefined
    return { state: 'wrong' }
  }

  /** The marker with the guesses at this code. */
  private counted(code: string | undefined) {
    const marker = { guesses: 0, ...this.marker }
    return code === undefined || marker.of === code ? marker : { ...marker, of: code, guesses: 0 }
  }

  release(code: string, owner: number, back: boolean, mayBeRegistered: boolean): void {
    const { marker } = this
    const ours = marker === undefined || marker.owner === owner
    if (!ours && (marker.code === code || marker.state !== 'done')) return
    if (back) this.code ??= code
    if (!ours) return
    const counted = { guesses: 0, ...marker }
    if (mayBeRegistered) this.marker = { ...counted, state: 'unknown', code, owner }
    else this.marker = back && counted.guesses > 0 ? { guesses: counted.guesses, of: counted.of } : undefined
  }

  complete(code: string, owner: number): void {
    this.marker = { state: 'done', code, owner, guesses: 0 }
  }
}

const someCode = fc.constantFrom('111111', '222222', '333333')
const step = fc.oneof(
  fc.record({ kind: fc.constant('issue' as const), code: someCode }),
  fc.record({ kind: fc.constant('take' as const), code: someCode, client: fc.nat(1) }),
  fc.record({ kind: fc.constant('take' as const), code: someCode, client: fc.nat(1) }),
  fc.record({
    kind: fc.constantFrom('put back', 'spend', 'complete'),
    which: fc.nat(20),
    sent: fc.boolean(),
    client: fc.nat(1)
  }),
  fc.record({ kind: fc.constantFrom('the code expires', 'the lease ends') })
)

t.test(
  'G1, G4, G5: the take of a code on two clients of a Redis does what its model does',
  { timeout: 120_000 },
  async (t) => {
    const apps = new Map<number, Awaited<ReturnType<typeof capability>>[]>()
    async function capability(attempts: number) {
      const app = Fastify()
      t.after(() => app.close())
      const config = testConfig({ SMS_CODE_ATTEMPTS: `${attempts}`, HASH_MAX_WAIT_MS: '600000' })
      await app.register(redisPlugin, config)
      await app.register(codes, config)
      return app.codes
    }
    for (const attempts of [1, 2, 3]) apps.set(attempts, [await capability(attempts), await capability(attempts)])

    await fc.assert(
      fc.asyncProperty(fc.integer({ min: 1, max: 3 }), fc.array(step, { maxLength: 25 }), async (attempts, steps) => {
        const mobile = `1${randomInt(3_000_000_000, 10_000_000_000)}`
        const [codeKey, markerKey] = [`sms_code_${mobile}`, `{sms_code_${mobile}}:attempt`]
        const model = new ModelOfTakes(attempts)
        const taken: { attempt: Attempt; owner: number }[] = []
        for (const now of steps) {
          const client = apps.get(attempts)?.['client' in now ? now.client : 0]
          if (client === undefined) throw new Error('no client')
          if (now.kind === 'issue' && 'code' in now) {
            model.code = now.code
            await redis.set(codeKey, now.code, 'EX', 300)
          } else if ('code' in now) {
            const expected = model.take(now.code)
            const { state, ...rest } = await client.take(mobile, now.code, 'sign-up')
            assert.equal(state, expected.state)
            if ('userId' in rest) await client.endReplay(mobile, rest.takenAt, false)
            if ('again' in rest) {
              assert.equal(rest.again, expected.again)
              taken.push({ attempt: rest, owner: expected.owner ?? 0 })
            }
          } else if ('which' in now) {
            const { attempt, owner } = taken[now.which % Math.max(1, taken.length)] ?? {}
            if (attempt === undefined || owner === undefined) continue
            if (now.kind === 'complete') {
              model.complete(attempt.code, owner)
              await client.complete(attempt, '1')
            } else {
              const back = now.kind === 'put back'
              model.release(attempt.code, owner, back, back && now.sent)
              await (back ? client.putBack(attempt, now.sent) : client.spend(attempt))
            }
          } else if (now.kind === 'the code expires') {
            model.code = undefined
            await redis.del(codeKey)
          } else if (model.marker?.state === 'pending') {
            // Whoever had it is gone; in the model as in Redis that is as good as unknown.
            model.marker.state = 'unknown'
            const marker = JSON.parse((await redis.get(markerKey)) ?? '{}')
            await redis.set(markerKey, JSON.stringify({ ...marker, state: 'unknown' }), 'KEEPTTL')
          }
          assert.equal(await redis.get(codeKey), model.code ?? null)
          const stored = JSON.parse((await redis.get(markerKey)) ?? 'null')
          assert.deepEqual([stored !== null, stored?.state], [model.marker !== undefined, model.marker?.state])
          if (stored !== null) assert.ok((await redis.pttl(markerKey)) > 0, 'a marker has an end')
        }
        await redis.del(codeKey, markerKey)
      }),
      { numRuns: 400 }
    )
  }
)
