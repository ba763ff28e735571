import type { Patch } from './system.js'

/** A bug of the protocol that the search must find. */
interface Bug {
  name: string
  /** The first scenario that shows it with the fewest deviations. To search the others, too, would take minutes. */
  scenario: string
  patches: readonly Patch[]
}

export const bugs: readonly Bug[] = [
  {
    name: 'a restore ignores a newer owner',
    scenario: 'two requests that are slower than the lease',
    patches: [
      {
        file: 'codes/scripts.js',
        text: `local is_own = record.at == ARGV[1] or not stored and now - ARGV[1] < tonumber(ARGV[8])
if not is_own then return record.mac == ARGV[2] and 0 or 1 end`,
        replacement: 'local is_own = true'
      }
    ]
  },
  {
    name: 'a lease is compared the wrong way',
    scenario: 'one client that retries',
    patches: [
      {
        file: 'codes/scripts.js',
        text: 'now - since < tonumber(ARGV[3])',
        replacement: 'now - since > tonumber(ARGV[3])'
      }
    ]
  },
  {
    name: 'a replay does not verify the password',
    scenario: 'two passwords for one code',
    patches: [
      {
        file: 'users/redeem-code.js',
        text: 'owner = user && (await verifyUser(user, mobile, password, reply));',
        replacement:
          'owner = user && { user: { user_id: user.id, name: user.name, mobile }, sessionEpoch: user.sessionEpoch };'
      }
    ]
  },
  {
    name: 'the claim record is written after the code is taken',
    scenario: 'one client that retries',
    patches: [
      {
        file: 'codes/scripts.js',
        text: `  redis.call('SET', KEYS[2], cjson.encode(pending), 'PX', math.max(tonumber(ARGV[4]), ttl))
  return { 'claimed', now, ttl, names_code and 1 or 0, cjson.encode(issue), mac }`,
        replacement: `  return { 'claimed', now, ttl, names_code and 1 or 0, cjson.encode(issue), mac }`
      },
      {
        file: 'codes/codes.js',
        text: 'const claim = { mobile, code: presentedCode, mac, ttlMs, claimId, isReclaim: isReclaim === 1 };',
        replacement: `const claim = { mobile, code: presentedCode, mac, ttlMs, claimId, isReclaim: isReclaim === 1 };
                    await fastify.withRedis((redis) => redis.set(recordKey(mobile), JSON.stringify({ state: 'pending', mac, at: claimId, ttl: ttlMs, issue: {} }), 'PX', pendingTtlMs));`
      }
    ]
  },
  {
    name: 'the budget of guesses is checked after the code',
    scenario: 'a guesser with one wrong code left',
    patches: [
      {
        file: 'codes/scripts.js',
        text: `if wait > 0 then return { 'spent', wait, spent } end

local code`,
        replacement: 'local code'
      },
      {
        file: 'codes/scripts.js',
        text: 'if code or stored then',
        replacement: `if wait > 0 then return { 'spent', wait, spent } end
if code or stored then`
      }
    ]
  },
  {
    name: 'a success leaves a code that was put back',
    scenario: 'two requests that are slower than the lease',
    patches: [
      {
        file: 'codes/scripts.js',
        text: `if redis.call('GET', KEYS[3]) == ARGV[4] then`,
        replacement: 'if false then'
      }
    ]
  },
  {
    name: 'an INSERT without an answer counts as written',
    scenario: 'one client that retries',
    patches: [
      {
        file: 'users/users.js',
        text: 'fastify.postgres.query(insertUser, [mobile, passwordHash])',
        replacement: `fastify.postgres.query(insertUser, [mobile, passwordHash]).catch(() => ({ rows: [{ id: '1' }] }))`
      }
    ]
  },
  {
    name: 'a session that is not stored counts as started',
    scenario: 'one client that retries',
    patches: [{ file: 'sessions/sessions.js', text: `return 'failed'`, replacement: `return 'started'` }]
  },
  {
    name: 'a used code resets the password again',
    scenario: 'two resets with different passwords',
    patches: [
      {
        file: 'users/redeem-code.js',
        text: `if (claim.state === 'done')`,
        replacement: `if (claim.state === 'done' && redemption.purpose === 'sign_up')`
      }
    ]
  },
  {
    name: 'a reset does not end the earlier sessions',
    scenario: 'two resets that are slower than the lease',
    patches: [
      { file: 'users/redeem-code.js', text: 'fastify.sessions.endBefore(row.id, row.sessionEpoch),', replacement: '' }
    ]
  },
  {
    name: 'a restore overwrites a new code',
    scenario: 'a sign-up and a new code',
    patches: [
      {
        file: 'codes/scripts.js',
        text: `redis.call('SET', KEYS[1], ARGV[6], 'NX', unpack(life))`,
        replacement: `redis.call('SET', KEYS[1], ARGV[6], unpack(life))`
      }
    ]
  },
  {
    name: 'a restore leaves nothing beside a new code',
    scenario: 'a failed hash and a withdrawn code',
    patches: [
      {
        file: 'codes/scripts.js',
        text: `if newer.code == redis.call('GET', KEYS[1]) and not newer.replaced then`,
        replacement: 'if false then'
      }
    ]
  },
  {
    name: 'a withdrawal puts a used code back',
    scenario: 'a sign-up and a withdrawn code',
    patches: [{ file: 'codes/scripts.js', text: 'replaced.code ~= code', replacement: 'true' }]
  }
]
