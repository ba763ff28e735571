/*
 * Lua scripts, because a code and its claim record must change together.
 *
 * KEYS[1] is the code. KEYS[2] is its claim record on the same Cluster slot, JSON:
 *   state      pending, unknown (the row may have been committed) or done; absent if the record only counts guesses
 *   mac        the keyed MAC of the claimed code
 *   at         when the code was claimed, in µs of Redis's clock; it identifies the claim
 *   ttl        the TTL of the code at that time, in ms; negative if it had none
 *   guesses    wrong guesses so far, at the code whose keyed hash is `of`
 *   user_id    only if done
 *   checking   when a replay began to verify its password, until it has ended
 *   passwords  wrong passwords of replays
 *
 * A full Redis refuses the first write of a script if it needs memory. So such a write comes first: a script then changes
 * everything or nothing.
 */

/**
 * ARGV: the presented code, SMS_CODE_ATTEMPTS, the lease in µs, the TTL of the record in ms, the key of the hash `of`, and
 * the MACs of the presented code under all secrets; the first of them is stored.
 *
 * Returns `{'claimed', at, ttl, 1 if the record names this code already, else 0}`, `{'in_progress'}`,
 * `{'done', user_id, at}` or `{'wrong'}`.
 */
export const claimCode = `
local code = redis.call('GET', KEYS[1])
local stored = redis.call('GET', KEYS[2])
local record = stored and cjson.decode(stored) or {}
local record_ttl = tonumber(ARGV[4])
local time = redis.call('TIME')
local now = time[1] .. string.format('%06d', time[2])

local names_code = false
for n = 6, #ARGV do names_code = names_code or record.mac == ARGV[n] end

local of = code and redis.sha1hex(ARGV[5] .. code)
if of and record.of ~= of then record.of, record.guesses = of, 0 end

local function claim(ttl)
  local pending =
    { state = 'pending', mac = ARGV[6], at = now, ttl = ttl, of = record.of, guesses = record.guesses }
  redis.call('SET', KEYS[2], cjson.encode(pending), 'PX', math.max(record_ttl, ttl))
  return { 'claimed', now, ttl, names_code and 1 or 0 }
end

if code == ARGV[1] then
  local claimed = claim(redis.call('PTTL', KEYS[1]))
  redis.call('GETDEL', KEYS[1])
  return claimed
end
if names_code then
  local since = record.state == 'pending' and record.at or record.checking
  if since and now - since < tonumber(ARGV[3]) then return { 'in_progress' } end
  if record.state ~= 'done' then return claim(record.ttl) end
  record.checking = now
  redis.call('SET', KEYS[2], cjson.encode(record), 'KEEPTTL')
  return { 'done', record.user_id, record.at }
end

local is_claimable = record.state == 'pending' or record.state == 'unknown'
if not code and not is_claimable then return { 'wrong' } end

record.guesses = (record.guesses or 0) + 1
if record.guesses < tonumber(ARGV[2]) then
  local ttl = math.max(redis.call('PTTL', KEYS[2]), redis.call('PTTL', KEYS[1]))
  redis.call('SET', KEYS[2], cjson.encode(record), 'PX', ttl > 0 and ttl or record_ttl)
else
  redis.call('DEL', KEYS[1])
  if record.state ~= 'done' then redis.call('DEL', KEYS[2]) end
end
return { 'wrong' }
`

/**
 * Ends a claim without success. If another request has claimed the same code since, nothing changes. If another code was
 * completed since, its record stays.
 *
 * ARGV: the claim's `at`, `mac` and `ttl`, the TTL of the record in ms, the code to restore or '' to discard it,
 * 1 if the row may have been committed, else 0. Returns 0 if another request has claimed the code since, else 1.
 */
export const endClaim = `
local stored = redis.call('GET', KEYS[2])
local record = stored and cjson.decode(stored) or {}
local is_own = not stored or record.at == ARGV[1]
if record.mac == ARGV[2] and not is_own then return 0 end
local ttl, record_ttl = tonumber(ARGV[3]), tonumber(ARGV[4])
if ARGV[5] ~= '' and (is_own or record.state == 'done') then
  if ttl < 0 then redis.call('SET', KEYS[1], ARGV[5], 'NX')
  else redis.call('SET', KEYS[1], ARGV[5], 'PX', math.max(ttl, 1), 'NX') end
end
if not is_own then return 1 end
local rest = { of = record.of, guesses = record.guesses }
if ARGV[6] == '1' then
  rest.state, rest.mac, rest.at, rest.ttl = 'unknown', ARGV[2], ARGV[1], ttl
elseif ARGV[5] == '' or (rest.guesses or 0) == 0 then
  redis.call('DEL', KEYS[2])
  return 1
end
redis.call('SET', KEYS[2], cjson.encode(rest), 'PX', math.max(record_ttl, ttl))
return 1
`

/**
 * Ends a replay that began with `{'done', …}`. The second wrong password deletes the record.
 *
 * KEYS[1] is the record. ARGV: the claim's `at`, 1 if the password was wrong, else 0.
 */
export const endReplay = `
local stored = redis.call('GET', KEYS[1])
local record = stored and cjson.decode(stored) or {}
if record.state ~= 'done' or record.at ~= ARGV[1] then return end
record.checking = nil
record.passwords = (record.passwords or 0) + ARGV[2]
if record.passwords < 2 then redis.call('SET', KEYS[1], cjson.encode(record), 'KEEPTTL')
else redis.call('DEL', KEYS[1]) end
`

/**
 * Stores a new code. Its guesses start at zero, because the record counts those at another code.
 *
 * KEYS[1] is the code. ARGV: the new code, its TTL in ms. Returns the previous code, or nil, and its TTL in ms.
 */
export const issueCode = `
local previous, ttl = redis.call('GET', KEYS[1]), redis.call('PTTL', KEYS[1])
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return { previous, ttl }
`

/**
 * Withdraws a new code and puts the previous one back, unless an even newer code has come.
 *
 * ARGV: the code to withdraw, the previous code or '', its TTL in ms.
 */
export const withdrawCode = `
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return end
local ttl = tonumber(ARGV[3])
if ARGV[2] == '' then redis.call('DEL', KEYS[1])
elseif ttl < 0 then redis.call('SET', KEYS[1], ARGV[2])
else redis.call('SET', KEYS[1], ARGV[2], 'PX', math.max(ttl, 1)) end
`
