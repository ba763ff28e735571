import assert from 'node:assert/strict'
import { randomInt } from 'node:crypto'
import fc from 'fast-check'
import Fastify from 'fastify'
import t, { type Test } from 'tap'
import { createCodes, type Hold } from '#src/codes/codes.js'
import { ConfigError, type Environment, loadConfig } from '#src/config/config.js'
import { InFlight } from '#src/http/in-flight.js'
import { type OutcomeName, outcomes, Refusal } from '#src/outcomes.js'
import { createRateLimits } from '#src/stores/rate-limits.js'
import { openRedis } from '#src/stores/redis.js'
import { client } from '../testkit/client.js'
import { claimKey, startTestbed } from '../testkit/testbed.js'

/*
 * Random inputs. The results are compared with models that were written from docs/api.md, docs/operating.md and
 * docs/guarantees.md, not from src.
 */

const { ageClaim, build, config, redis } = await startTestbed(t)

/** Returns the outcome of a sign-up whose code is wrong: the first fault in the order of docs/api.md. */
function expectedOutcome(body: unknown): OutcomeName {
  if (typeof body !== 'object' || body === null || Array.isArray(body)) return 'malformed_parameter'
  const fields = new Map(Object.entries(body))
  const values = ['mobile', 'sms_code', 'password', 'password2'].map((name) => fields.get(name))
  if (values.some((value) => value === undefined || value === null || value === '')) return 'missing_parameter'
  const texts = values.filter((value) => typeof value === 'string')
  const [mobile = '', code = '', password = '', password2] = texts
  if (texts.length < 4 || [...code].length > 64) return 'malformed_parameter'
  if (texts.some((text) => /\p{Surrogate}/u.test(text))) return 'malformed_parameter'
  if (mobile.length !== 11 || !/^1[3-9]/.test(mobile) || /[^0-9]/.test(mobile)) return 'invalid_mobile'
  if (password !== password2) return 'passwords_differ'
  if ([...password].length < 8 || [...password].length > 128) return 'password_length'
  const canonical = password.normalize('NFKC').toLowerCase()
  if (canonical === mobile || ['password', 'password1', '12345678', 'iloveyou'].includes(canonical)) {
    return 'password_common'
  }
  return 'wrong_code'
}

t.test('a body gets the outcome of the first fault in the order of docs/api.md', async (t) => {
  const { signUp } = client(await build(t))
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
    // With a character that no common password has, because the model does not know the list.
    fc.string({ minLength: 5, maxLength: 12, unit: 'grapheme' }).map((text) => `${text}§`),
    fc.integer({ min: 126, max: 130 }).map((length) => '§'.repeat(length))
  )
  const anything = fc.oneof(fc.constantFrom('', null, undefined), fc.jsonValue({ maxDepth: 1 }))
  const mostly = <T>(usual: fc.Arbitrary<T>) =>
    fc.oneof({ weight: 8, arbitrary: usual }, { weight: 1, arbitrary: anything })
  const mobile = fc.constantFrom(
    '13900001111',
    '12900001111',
    '139000011110',
    '１３９００００１１１１',
    '1390000111a',
    '13900001111\n'
  )
  const body = fc
    .record({
      mobile: mostly(mobile),
      sms_code: mostly(
        fc.oneof(fc.string({ minLength: 1, maxLength: 18 }), fc.string({ minLength: 60, maxLength: 68 }))
      ),
      password: mostly(password),
      password2: mostly(password)
    })
    .chain((fields) =>
      fc.boolean().map((isRepeated) => (isRepeated ? { ...fields, password2: fields.password, unknown: 1 } : fields))
    )
  await fc.assert(
    fc.asyncProperty(
      fc.oneof({ weight: 20, arbitrary: body }, { weight: 1, arbitrary: fc.jsonValue({ maxDepth: 1 }) }),
      async (value) => {
        const json = JSON.stringify(value)
        const { status, errno, zh } = outcomes[expectedOutcome(JSON.parse(json))]
        const reply = await signUp(json)
        assert.deepEqual(
          [reply.statusCode, reply.json()],
          [status, { errno, errmsg: zh.replace('{min}', '8').replace('{max}', '128') }]
        )
      }
    ),
    { numRuns: 2_000 }
  )
})

/** The bounds of integer variables. */
const integerBounds = {
  PORT: [0, 65_535],
  PASSWORD_MIN: [1, 128],
  HASH_MEMORY_KIB: [8, 4_194_304],
  HASH_PASSES: [1, 1_000],
  HASH_THREADS: [1, 1_020],
  HASH_MAX_WAIT_MS: [0, 600_000],
  PG_POOL_MAX: [1, 1_000],
  STORE_TIMEOUT_MS: [1, 60_000],
  SMS_CODE_ATTEMPTS: [1, 1_000]
} as const

t.test('integer variables are accepted within their bounds, and else named in an error without secrets', async () => {
  const camel = (name: string) => name.toLowerCase().replace(/_(.)/g, (_, letter: string) => letter.toUpperCase())
  const others = {
    DATABASE_URL: 'postgresql://u:pass-word@host/db',
    REDIS_URL: 'redis://:pass-word@host/1',
    UV_THREADPOOL_SIZE: '1024'
  }
  const text = fc.oneof(
    fc.string({ maxLength: 8 }),
    fc.integer().map(String),
    fc.constantFrom('1e3', '0x10', ' 5', '5 ', '１')
  )
  const environment = fc.record(Object.fromEntries(Object.keys(integerBounds).map((name) => [name, text])), {
    requiredKeys: []
  })

  /** Returns the names of the invalid variables, sorted. */
  function expectedFaults(env: Environment): string[] {
    const faults = Object.entries(integerBounds).filter(([name, [min, max]]) => {
      const value = env[name]
      return value && !(/^-?\d+$/.test(value) && Number(value) >= min && Number(value) <= max)
    })
    return faults.map(([name]) => name).sort()
  }

  fc.assert(
    fc.property(environment, (env) => {
      try {
        const loaded = new Map(Object.entries(loadConfig({ ...others, ...env })))
        assert.deepEqual([], expectedFaults(env))
        for (const [name, value] of Object.entries(env)) {
          if (value !== '') assert.equal(loaded.get(camel(name)), Number(value))
        }
      } catch (error) {
        if (!(error instanceof ConfigError)) throw error
        assert.deepEqual(error.faults.map((fault) => fault.split(':')[0]).sort(), expectedFaults(env))
        assert.ok(!error.message.includes('pass-word'), 'the message has no secret')
      }
    }),
    { numRuns: 2_000 }
  )
})

/** What the next request with a code learns of the earlier ones. */
interface Learnt {
  mayHaveWritten: boolean
  usedBy: string | undefined
}

/** The protocol of docs/guarantees.md for the code of one mobile. A lease expires only in a step of its own. */
class CodeModel {
  code: string | undefined
  claim: (Learnt & { code: string; holder: number; isHeld: boolean; isLeased: boolean; wrong: number }) | undefined

  /** @returns what the request learns, or the outcome that refuses it */
  hold(presented: string, holder: number): Learnt | string {
    const former = this.claim?.code === presented ? this.claim : undefined
    if (this.code === presented) {
      this.code = undefined
      const mayHaveWritten =
        former !== undefined && (former.mayHaveWritten || former.isHeld || former.usedBy !== undefined)
      const learnt = { mayHaveWritten, usedBy: undefined }
      this.claim = { code: presented, holder, isHeld: true, isLeased: true, wrong: 0, ...learnt }
      return learnt
    }
    if (former === undefined) return 'wrong_code'
    if (former.usedBy === '') return 'used_in_vain'
    if (former.isHeld && former.isLeased) return 'busy'
    if (former.isHeld) former.mayHaveWritten = true
    Object.assign(former, { holder, isHeld: true, isLeased: true })
    return { mayHaveWritten: former.mayHaveWritten, usedBy: former.usedBy }
  }

  /** @returns whether the request has held the code */
  release(holder: number, how: string): boolean {
    const { claim } = this
    if (claim === undefined || claim.holder !== holder || !claim.isHeld) return false
    claim.isHeld = false
    if (how === 'may_have_written') claim.mayHaveWritten = true
    if (how === 'used') Object.assign(claim, { usedBy: '7', mayHaveWritten: false })
    if (how === 'used_in_vain') claim.usedBy = ''
    if (how === 'wrong_password' && ++claim.wrong === 2) this.claim = undefined
    return true
  }
}

type Step =
  | { kind: 'issue'; code: string }
  | { kind: 'hold'; code: string; instance: number }
  /** Ends one of the holds so far. */
  | {
      kind: 'release'
      hold: number
      how: 'unused' | 'may_have_written' | 'used' | 'used_in_vain' | 'wrong_password'
      instance: number
    }
  | { kind: 'the code expires' | 'the lease expires' }

const someCode = fc.constantFrom('111111', '222222', '333333')
const instance = fc.nat(1)
const step: fc.Arbitrary<Step> = fc.oneof(
  fc.record({ kind: fc.constant('issue'), code: someCode }),
  { weight: 3, arbitrary: fc.record({ kind: fc.constant('hold'), code: someCode, instance }) },
  {
    weight: 3,
    arbitrary: fc.record({
      kind: fc.constant('release'),
      hold: fc.nat(20),
      how: fc.constantFrom('unused', 'may_have_written', 'used', 'used_in_vain', 'wrong_password'),
      instance
    })
  },
  fc.record({ kind: fc.constantFrom('the code expires', 'the lease expires') })
)

/** Long, because most steps do nothing until a code has been issued and held. */
const sequenceOfSteps = fc.array(step, { minLength: 10, maxLength: 30, size: 'max' })

/** Returns the codes of a mobile, as an instance of the service sees them. */
async function buildCodes(t: Test) {
  const app = Fastify()
  t.after(() => app.close())
  const unlimited = config({ SMS_CODE_ATTEMPTS: '1000', SMS_GUESS_DAILY_MAX: '0', HASH_MAX_WAIT_MS: '600000' })
  const redis = await openRedis(app, unlimited, undefined)
  return createCodes(unlimited, redis, createRateLimits(redis, undefined), new InFlight(), undefined)
}

t.test(
  'G1, G4, G5: random steps of two instances change a code and its claim as in a model',
  { timeout: 110_000 },
  async (t) => {
    const instances = [await buildCodes(t), await buildCodes(t)]
    const { log } = Fastify()

    await fc.assert(
      fc.asyncProperty(sequenceOfSteps, async (steps) => {
        const mobile = `1${randomInt(3_000_000_000, 10_000_000_000)}`
        const codeKey = `sms_code_${mobile}`
        const model = new CodeModel()
        const holds: Hold[] = []
        const instanceOf = (step: { instance: number }) => {
          const instance = instances[step.instance]
          if (instance === undefined) throw new Error('no such instance')
          return instance
        }

        for (const step of steps) {
          switch (step.kind) {
            case 'issue':
              model.code = step.code
              await redis.set(codeKey, step.code, 'EX', 300)
              break
            case 'hold': {
              const expected = model.hold(step.code, holds.length)
              const request = { body: { mobile, sms_code: step.code }, ip: '192.0.2.1', log }
              try {
                const hold = await instanceOf(step).hold(request, 'sign_up')
                if (hold === 'used_in_vain') assert.equal(hold, expected)
                else {
                  const { mayHaveWritten, usedBy } = hold
                  assert.deepEqual({ mayHaveWritten, usedBy }, expected)
                  holds.push(hold)
                }
              } catch (error) {
                if (!(error instanceof Refusal)) throw error
                assert.equal(error.outcome, expected)
              }
              break
            }
            case 'release': {
              const number = step.hold % Math.max(1, holds.length)
              const hold = holds[number]
              if (hold === undefined) break
              const isHolder = await instanceOf(step).release(hold, step.how, '7')
              assert.equal(isHolder, model.release(number, step.how))
              break
            }
            case 'the code expires':
              model.code = undefined
              await redis.del(codeKey)
              break
            case 'the lease expires':
              if (model.claim === undefined) break
              model.claim.isLeased = false
              await ageClaim(mobile, 1_000_000)
          }
          assert.equal(await redis.get(codeKey), model.code ?? null)
          const claim = JSON.parse((await redis.get(claimKey(mobile))) ?? 'null')
          assert.deepEqual([claim?.code, claim?.used_by], [model.claim?.code, model.claim?.usedBy])
          if (claim !== null) assert.ok((await redis.pttl(claimKey(mobile))) > 0, 'a claim has a TTL')
        }
        await redis.del(codeKey, claimKey(mobile))
      }),
      { numRuns: 400 }
    )
  }
)
