import type { Equivalents } from '../mutants/summary.js'

/** Mutants that no test can kill, by the reason. Each is written as the run prints it. */
export const equivalents: readonly Equivalents[] = [
  {
    reason: 'Lua lists begin with 1, so what is stored under 0 is never read.',
    mutants: [
      'claimCode: for n = «1 → 0», budgets do fields[n] = ARGV[3 * n + 4] end',
      'claimCode: for n = «1 → 0», budgets do'
    ]
  },
  {
    reason: 'The initial value is replaced before it is used, or every reader takes it for 0.',
    mutants: [
      'claimCode: local wait, spent = «0 → -1», 0',
      'claimCode: local wait, spent = 0, «0 → 1»',
      'claimCode: local wait, spent = 0, «0 → -1»',
      "claimCode: local count, since = string.match(guesses[n] or «'' → 'x'», '(%d+) (%d+)')",
      'consumeLimits: local wait, longest = «0 → -1», 0',
      'consumeLimits: local wait, longest = 0, «0 → 1»',
      'consumeLimits: local wait, longest = 0, «0 → -1»'
    ]
  },
  {
    reason: 'The loop also compares numbers with the MAC. They never equal it.',
    mutants: [
      'claimCode: for n = «7 → 6» + 3 * budgets, #ARGV do names_code = names_code or record.mac == ARGV[n] end',
      'claimCode: for n = 7 + «3 → 2» * budgets, #ARGV do names_code = names_code or record.mac == ARGV[n] end'
    ]
  },
  {
    reason: 'The caller asks only whether the value is 0, is 1 or is positive.',
    mutants: [
      "claimCode: return { 'claimed', now, ttl, names_code and 1 or «0 → -1», cjson.encode(issue), mac }",
      'endClaim: if not is_own then return record.mac == ARGV[2] and 0 or «1 → 2» end',
      "completeClaim: return is_own_code and record.state == 'done' and 0 or «1 → 2»",
      'endClaim: return «1 → 2»',
      'endClaim: «return 1 → »',
      'consumeLimits: return { «0 → -1», 0 }',
      'consumeLimits: return { 0, «0 → 1» }',
      'consumeLimits: return { 0, «0 → -1» }'
    ]
  },
  {
    reason:
      'Session epochs are not negative, so an absent one is less than any other, whether it counts as 0 or as -1.',
    mutants: [
      "indexSession: if tonumber(redis.call('GET', KEYS[2]) or «0 → -1») > tonumber(ARGV[2]) then return nil end",
      "endSessions: if tonumber(redis.call('GET', KEYS[2]) or «0 → -1») < tonumber(ARGV[1]) then"
    ]
  },
  {
    reason: 'Redis reads an empty text as 0, and every score in the index is a time after 1970.',
    mutants: ["indexSession: redis.call('ZREMRANGEBYSCORE', KEYS[1], «'-inf' → ''», now)"]
  },
  {
    reason: 'The same epoch is written again. Its TTL may only become longer.',
    mutants: ["endSessions: if tonumber(redis.call('GET', KEYS[2]) or 0) «< → <=» tonumber(ARGV[1]) then"]
  },
  {
    reason: 'It also deletes an issue of another code, which applies to no code any more.',
    mutants: ["claimCode: if «issue.sends → true» then redis.call('DEL', KEYS[3]) end"]
  },
  {
    reason: 'Of equal waits another one is taken. Nobody promises which limit is reported then.',
    mutants: [
      'claimCode: if counts[n] >= max and rest «> → >=» wait then wait, spent = rest, n end',
      'consumeLimits: if math.max(ttl, 1) «> → >=» wait then wait, longest = math.max(ttl, 1), n end'
    ]
  },
  {
    reason: 'Each negative TTL stands for none.',
    mutants: ['claimCode: return claim(rest or -«1 → 2», replaced.issue or {})']
  },
  {
    reason: 'PTTL is 0 only in the last millisecond of a code. No test can send a request in that millisecond.',
    mutants: [
      'issueCode: local expires = ttl «>= → >» 0 and math.floor(now / 1000) + ttl or nil',
      'issueCode: local expires = ttl >= «0 → 1» and math.floor(now / 1000) + ttl or nil'
    ]
  },
  {
    reason: 'A time ends one microsecond of the clock of Redis later. No test can send a request in that microsecond.',
    mutants: [
      'claimCode: if not count or now - since «>= → >» window then count, since = 0, now end',
      "claimCode: if since and now - since «< → <=» tonumber(ARGV[3]) then return { 'in_progress' } end",
      'endClaim: local is_own = record.at == ARGV[1] or not stored and now - ARGV[1] «< → <=» tonumber(ARGV[8])'
    ]
  },
  {
    reason: 'A time ends one millisecond sooner or later, which no client can see.',
    mutants: [
      'claimCode: local rest = math.«ceil → floor»((window - (now - since)) / 1000)',
      "claimCode: if wait > «0 → 1» then return { 'spent', wait, spent } end",
      "endClaim: local life = ttl < 0 and {} or { 'PX', math.max(ttl, «1 → 2») }",
      "issueCode: if is_own and (issue.purpose or '') == ARGV[3] and ttl «>= → >» tonumber(ARGV[5]) then",
      'claimCode: local rest = replaced.expires and math.max(math.«floor → ceil»(replaced.expires - now / 1000), 0)',
      'endClaim: local expires = ttl >= 0 and math.«floor → ceil»(now / 1000) + ttl or nil',
      'issueCode: local expires = ttl >= 0 and math.«floor → ceil»(now / 1000) + ttl or nil',
      'withdrawCode: local rest = replaced and replaced.expires and math.«floor → ceil»(replaced.expires - now / 1000)',
      'withdrawCode: if not replaced or rest and rest <= «0 → 1» then',
      'consumeLimits: if math.max(ttl, «1 → 0») > wait then wait, longest = math.max(ttl, 1), n end',
      'consumeLimits: if math.max(ttl, «1 → 2») > wait then wait, longest = math.max(ttl, 1), n end',
      'consumeLimits: if math.max(ttl, 1) > wait then wait, longest = math.max(ttl, «1 → 0»), n end',
      'consumeLimits: if math.max(ttl, 1) > wait then wait, longest = math.max(ttl, «1 → 2»), n end',
      "consumeLimits: if wait > «0 → 1» or ARGV[1] == '0' then return { wait, longest } end"
    ]
  }
]
