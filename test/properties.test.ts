import assert from 'node:assert/strict'
import { randomInt } from 'node:crypto'
import fc from 'fast-check'
import Fastify, { type FastifyInstance } from 'fastify'
import t, { type Test } from 'tap'
import { type Claim, codes } from '../dist/codes/codes.js'
import { ConfigError, type Environment, loadConfig } from '../dist/config/config.js'
import { type OutcomeName, outcomes } from '../dist/outcomes.js'
import { rateLimits } from '../dist/stores/rate-limits.js'
import { redis as redisPlugin } from '../dist/stores/redis.js'
import { client } from '../testkit/client.js'
import { recordKey, startTestbed } from '../testkit/testbed.js'

/*
 * Random inputs. The results are compared with models that were written from docs/api.md, docs/configuration.md and
 * docs/guarantees.md, not from src.
 */

const { build, config, redis } = await startTestbed(t)

/** Returns the outcome of a sign-up whose code is wrong: the first fault in the order of docs/api.md. */
function expectedOutcome(body: unknown): OutcomeName {
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
      sms_code: mostly(fc.string({ minLength: 1, maxLength: 18 })),
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

/** The bounds of integer variables in docs/configuration.md. */
const integerBounds = {
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

t.test('integer variables are accepted within their bounds, and else named in an error without secrets', async () => {
  const camel = (name: string) => name.toLowerCase().replace(/_(.)/g, (_, letter: string) => letter.toUpperCase())
  const urls = { DATABASE_URL: 'postgresql://u:pass-word@host/db', REDIS_URL: 'redis://:pass-word@host/1' }
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
        const loaded = new Map(Object.entries(loadConfig({ ...urls, ...env })))
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

/** The protocol of docs/guarantees.md for the code of one mobile. A lease expires only in a step of its own. */
class CodeModel {
  code: string | undefined
  record:
    | {
        state: 'pending' | 'unknown' | 'done'
        /** The claimed code, and the number of its claim. */
        code: string
        claim: number
      }
    | undefined
  private claims = 0
  private readonly reclaims = new Set<number>()

  claim(presented: string): { state: string; isReclaim?: boolean; claim?: number } {
    const { code, record } = this
    const isNamed = record?.code === presented
    if (code !== presented && isNamed && record.state === 'done') return { state: 'done' }
    if (code !== presented && isNamed && record.state === 'pending') return { state: 'in_progress' }
    if (code !== presented && !isNamed) return { state: 'wrong' }
    if (code === presented) this.code = undefined
    this.record = { state: 'pending', code: presented, claim: ++this.claims }
    if (isNamed) this.reclaims.add(this.claims)
    return { state: 'claimed', isReclaim: isNamed, claim: this.claims }
  }

  restore(code: string, claim: number, mayBeCommitted: boolean): void {
    this.end(code, claim, true, mayBeCommitted)
  }

  /** @returns whether no other request has claimed the code since */
  discard(code: string, claim: number): boolean {
    return this.end(code, claim, false, false)
  }

  private end(code: string, claim: number, isRestored: boolean, mayBeCommitted: boolean): boolean {
    const { record } = this
    // Without a record, an earlier request may have completed the code of a reclaim.
    const isOwn = record === undefined ? !this.reclaims.has(claim) : record.claim === claim
    if (!isOwn) return record?.code !== code
    if (isRestored) this.code ??= code
    this.record = mayBeCommitted ? { state: 'unknown', code, claim } : undefined
    return true
  }

  complete(code: string, claim: number): void {
    if (this.code === code) this.code = undefined
    const { record } = this
    if (record === undefined || record.code === code || record.state === 'done')
      this.record = { state: 'done', code, claim }
  }

  expireLease(): void {
    // A pending claim whose lease has expired can be claimed like one of unknown outcome.
    if (this.record?.state === 'pending') this.record.state = 'unknown'
  }
}

type Step =
  | { kind: 'issue'; code: string }
  | { kind: 'claim'; code: string; instance: number }
  /** Ends one of the claims so far. */
  | { kind: 'restore' | 'discard' | 'complete'; claim: number; mayBeCommitted: boolean; instance: number }
  | { kind: 'the code expires' }
  | { kind: 'the lease expires' }

const someCode = fc.constantFrom('111111', '222222', '333333')
const instance = fc.nat(1)
const step: fc.Arbitrary<Step> = fc.oneof(
  fc.record({ kind: fc.constant('issue'), code: someCode }),
  { weight: 2, arbitrary: fc.record({ kind: fc.constant('claim'), code: someCode, instance }) },
  {
    weight: 2,
    arbitrary: fc.record({
      kind: fc.constantFrom('restore', 'discard', 'complete'),
      claim: fc.nat(20),
      mayBeCommitted: fc.boolean(),
      instance
    })
  },
  fc.record({ kind: fc.constantFrom('the code expires', 'the lease expires') })
)

const guesser = { ticket: undefined, address: '192.0.2.1' }

/** Long, because most steps do nothing until a code has been issued and claimed. */
const sequenceOfSteps = fc.array(step, { minLength: 10, maxLength: 30, size: 'max' })

/** Returns the codes of a mobile, as an instance of the service sees them. */
async function buildCodes(t: Test): Promise<FastifyInstance['codes']> {
  const app = Fastify()
  t.after(() => app.close())
  const options = {
    config: config({
      SMS_CODE_ATTEMPTS: '1000',
      SMS_GUESS_DAILY_MAX: '0',
      HASH_MAX_WAIT_MS: '600000'
    })
  }
  await app.register(redisPlugin, options)
  await app.register(rateLimits, {})
  await app.register(codes, options)
  return app.codes
}

t.test(
  'G1, G4, G5: random steps of two instances change a code and its claim record as in a model',
  { timeout: 110_000 },
  async (t) => {
    const instances = [await buildCodes(t), await buildCodes(t)]

    await fc.assert(
      fc.asyncProperty(sequenceOfSteps, async (steps) => {
        const mobile = `1${randomInt(3_000_000_000, 10_000_000_000)}`
        const codeKey = `sms_code_${mobile}`
        const model = new CodeModel()
        const claims: { claim: Claim; number: number }[] = []
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
            case 'claim': {
              const expected = model.claim(step.code)
              const result = await instanceOf(step).claim(mobile, step.code, 'sign_up', guesser)
              assert.equal(result.state, expected.state)
              if (result.state === 'done') await instanceOf(step).endReplay(result, { passwordWasWrong: false })
              if (result.state === 'claimed') {
                assert.equal(result.isReclaim, expected.isReclaim)
                claims.push({ claim: result, number: expected.claim ?? 0 })
              }
              break
            }
            case 'the code expires':
              model.code = undefined
              await redis.del(codeKey)
              break
            case 'the lease expires': {
              model.expireLease()
              const record = JSON.parse((await redis.get(recordKey(mobile))) ?? '{}')
              if (record.state !== 'pending') break
              await redis.set(recordKey(mobile), JSON.stringify({ ...record, state: 'unknown' }), 'KEEPTTL')
              break
            }
            default: {
              const ended = claims[step.claim % Math.max(1, claims.length)]
              if (ended === undefined) break
              const { claim, number } = ended
              if (step.kind === 'complete') {
                model.complete(claim.code, number)
                await instanceOf(step).complete(claim, '1')
              } else if (step.kind === 'restore') {
                model.restore(claim.code, number, step.mayBeCommitted)
                await instanceOf(step).restore(claim, step.mayBeCommitted)
              } else {
                const isOwnClaim = model.discard(claim.code, number)
                assert.deepEqual(await instanceOf(step).discard(claim), { wasTakenOver: !isOwnClaim })
              }
            }
          }
          assert.equal(await redis.get(codeKey), model.code ?? null)
          const record = JSON.parse((await redis.get(recordKey(mobile))) ?? 'null')
          assert.deepEqual([record !== null, record?.state], [model.record !== undefined, model.record?.state])
          if (record !== null) assert.ok((await redis.pttl(recordKey(mobile))) > 0, 'a claim record has a TTL')
        }
        await redis.del(codeKey, recordKey(mobile))
      }),
      { numRuns: 400 }
    )
  }
)
