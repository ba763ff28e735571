/*
 * Lua scripts, because a code and its claim record must change together. All keys are on one Cluster slot:
 *
 * The code, a plain string that other services may also write.
 *
 * The claim record, JSON:
 *   state      pending, unknown (the row may have been committed) or done
 *   mac        the keyed MAC of the claimed code
 *   at         when the code was claimed, in µs of Redis's clock; it identifies the claim
 *   ttl        the TTL of the code at that time, in ms; negative if it had none
 *   issue      the purpose and the sends of the code's issue
 *   user_id    only if done
 *   checking   when a replay began to verify its password, until it has ended
 *   passwords  wrong passwords of replays
 *
 * The issue of a code that this service has made, JSON. It has the TTL of the code:
 *   code       the code that was issued; if another service has stored another code since, the issue does not apply
 *   purpose    sign_up or password; absent if the code is for both
 *   sends      for each message with the code: its time `at`, in µs of Redis's clock, and the `network` that asked for it
 *   replaced   the code before this one; a withdrawal puts it back. It has its `code`, the time when it `expires` in ms of
 *              Redis's clock (absent if it has no TTL), and its `issue` (absent if another service wrote the code)
 *
 * The guesses, a hash. Each field is a budget: the number of wrong codes in its window, and the start of the window in µs.
 *
 * A full Redis refuses the first write of a script if it needs memory. So such a write comes first: a script then changes
 * everything or nothing.
 */

/** Defines `now`, in µs, as a text: a number would lose its last digits when it is printed. */
const readClock = `
local time = redis.call('TIME')
local now = time[1] .. string.format('%06d', time[2])
`

/** Defines `forget_replaced`: a withdrawal must not put a code back that is claimed or used. */
const forgetReplaced = `
local function forget_replaced(issue_key, code)
  local issue = cjson.decode(redis.call('GET', issue_key) or '{}')
  local replaced = issue.replaced
  if not replaced or replaced.code ~= code then return end
  issue.replaced = nil
  redis.call('SET', issue_key, cjson.encode(issue), 'KEEPTTL')
  return replaced
end
`

/**
 * KEYS: the code, the record, the issue, the guesses. ARGV: the presented code, the purpose, the lease in µs, the TTL of the
 * record in ms, the TTL of the guesses in ms, the number of budgets, for each budget its field, maximum and window in ms,
 * and the MACs of the presented code under all secrets. The first of them is stored, unless the record names this code already.
 *
 * Returns `{'claimed', at, ttl, 1 if the record names this code already, else 0, issue, mac}`, `{'in_progress'}`,
 * `{'done', user_id, at}`, `{'wrong'}`, or
 * `{'spent', ms, number}`: the ms until the budget with the longest wait has room again, and its number.
 */
export const claimCode = `${readClock}${forgetReplaced}
local budgets = tonumber(ARGV[6])
local fields = {}
for n = 1, budgets do fields[n] = ARGV[3 * n + 4] end
local guesses = redis.call('HMGET', KEYS[4], unpack(fields))
local counts, starts = {}, {}
local wait, spent = 0, 0
for n = 1, budgets do
  local max, window = tonumber(ARGV[3 * n + 5]), 1000 * ARGV[3 * n + 6]
  local count, since = string.match(guesses[n] or '', '(%d+) (%d+)')
  if not count or now - since >= window then count, since = 0, now end
  counts[n], starts[n] = tonumber(count), since
  local rest = math.ceil((window - (now - since)) / 1000)
  if counts[n] >= max and rest > wait then wait, spent = rest, n end
end
if wait > 0 then return { 'spent', wait, spent } end

local code = redis.call('GET', KEYS[1])
local stored = redis.call('GET', KEYS[2])
local record = stored and cjson.decode(stored) or {}
local names_code = false
for n = 7 + 3 * budgets, #ARGV do names_code = names_code or record.mac == ARGV[n] end

local function claim(ttl, issue)
  issue.code, issue.replaced = nil, nil
  local mac = names_code and record.mac or ARGV[7 + 3 * budgets]
  local pending = { state = 'pending', mac = mac, at = now, ttl = ttl, issue = issue }
  redis.call('SET', KEYS[2], cjson.encode(pending), 'PX', math.max(tonumber(ARGV[4]), ttl))
  return { 'claimed', now, ttl, names_code and 1 or 0, cjson.encode(issue), mac }
end

if code == ARGV[1] then
  local issue = cjson.decode(redis.call('GET', KEYS[3]) or '{}')
  if issue.code ~= code then issue = {} end
  if (issue.purpose or ARGV[2]) == ARGV[2] then
    local claimed = claim(redis.call('PTTL', KEYS[1]), issue)
    redis.call('GETDEL', KEYS[1])
    if issue.sends then redis.call('DEL', KEYS[3]) end
    return claimed
  end
elseif names_code then
  local since = record.state == 'pending' and record.at or record.checking
  if since and now - since < tonumber(ARGV[3]) then return { 'in_progress' } end
  if record.state ~= 'done' then
    local replaced = forget_replaced(KEYS[3], ARGV[1])
    if not replaced then return claim(record.ttl, record.issue or {}) end
    local rest = replaced.expires and math.max(math.floor(replaced.expires - now / 1000), 0)
    return claim(rest or -1, replaced.issue or {})
  end
  record.checking = now
  redis.call('SET', KEYS[2], cjson.encode(record), 'KEEPTTL')
  return { 'done', record.user_id, record.at }
end

if code or stored then
  for n = 1, budgets do redis.call('HSET', KEYS[4], fields[n], counts[n] + 1 .. ' ' .. starts[n]) end
  redis.call('PEXPIRE', KEYS[4], ARGV[5])
end
return { 'wrong' }
`

/**
 * Ends a claim without success. A newer code stays. If the newer code is withdrawn later, and has replaced no other code, the
 * claimed code comes back. If another request has claimed a code of the mobile since, nothing changes. Without a record nothing
 * changes either, if another request may have completed the code, and its record may have expired or been replaced.
 *
 * KEYS: the code, the record, the issue. ARGV: the claim's `at`, `mac`, `ttl` and `issue`, the TTL of the record in ms, the
 * code to restore or '' to discard it, 1 if the row may have been committed, else 0, for how long the claim is exclusive, in µs.
 * Returns 0 if another request has claimed the code since, else 1.
 */
export const endClaim = `${readClock}
local stored = redis.call('GET', KEYS[2])
local record = stored and cjson.decode(stored) or {}
local is_own = record.at == ARGV[1] or not stored and now - ARGV[1] < tonumber(ARGV[8])
if not is_own then return record.mac == ARGV[2] and 0 or 1 end
local ttl, issue = tonumber(ARGV[3]), cjson.decode(ARGV[4])
if ARGV[6] ~= '' then
  local life = ttl < 0 and {} or { 'PX', math.max(ttl, 1) }
  local own_issue = issue.sends and { code = ARGV[6], purpose = issue.purpose, sends = issue.sends }
  if not redis.call('SET', KEYS[1], ARGV[6], 'NX', unpack(life)) then
    local newer = cjson.decode(redis.call('GET', KEYS[3]) or '{}')
    if newer.code == redis.call('GET', KEYS[1]) and not newer.replaced then
      local expires = ttl >= 0 and math.floor(now / 1000) + ttl or nil
      newer.replaced = { code = ARGV[6], expires = expires, issue = own_issue }
      redis.call('SET', KEYS[3], cjson.encode(newer), 'KEEPTTL')
    end
  elseif own_issue then
    redis.call('SET', KEYS[3], cjson.encode(own_issue), unpack(life))
  end
end
if ARGV[7] == '1' then
  local unknown = { state = 'unknown', mac = ARGV[2], at = ARGV[1], ttl = ttl, issue = issue }
  redis.call('SET', KEYS[2], cjson.encode(unknown), 'PX', math.max(tonumber(ARGV[5]), ttl))
else
  redis.call('DEL', KEYS[2])
end
return 1
`

/**
 * Ends a claim with success, and resets the guesses at the mobile. If another request has held the same code meanwhile and
 * put it back, the code is used up. If another code has been claimed since, the record of that claim stays: the instance that
 * claimed it may die, and only the record brings that code back.
 *
 * KEYS: the record, the guesses, the code, the issue. ARGV: the record, its TTL in ms, its `mac`, the claimed code. Returns 0
 * if the same code was completed before, else 1.
 */
export const completeClaim = `${forgetReplaced}
local stored = redis.call('GET', KEYS[1])
local record = stored and cjson.decode(stored) or {}
local is_own_code = record.mac == ARGV[3]
if is_own_code or not stored or record.state == 'done' then redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2]) end
redis.call('DEL', KEYS[2])
if redis.call('GET', KEYS[3]) == ARGV[4] then redis.call('DEL', KEYS[3], KEYS[4])
else forget_replaced(KEYS[4], ARGV[4]) end
return is_own_code and record.state == 'done' and 0 or 1
`

/**
 * Ends a reclaim without success. The record becomes done, with the user that the earlier request may have created. The
 * password of this request counts as the first wrong password of a replay. Nothing changes if another request has claimed the
 * code since.
 *
 * KEYS[1] is the record. ARGV: the claim's `at` and `mac`, the user's id, the TTL of the record in ms.
 */
export const concedeClaim = `
local stored = redis.call('GET', KEYS[1])
if stored and cjson.decode(stored).at ~= ARGV[1] then return end
local done = { state = 'done', mac = ARGV[2], at = ARGV[1], user_id = ARGV[3], passwords = 1 }
redis.call('SET', KEYS[1], cjson.encode(done), 'PX', ARGV[4])
`

/**
 * Claims a completed code again, because Postgres has lost the row.
 *
 * KEYS[1] is the record. ARGV: the completed claim's `at`, the TTL of the record in ms. Returns the new claim's `at` and `mac`,
 * or nothing if the record is another one by now. The code has no life left: only the record lets the same request try again.
 */
export const reopenClaim = `${readClock}
local stored = redis.call('GET', KEYS[1])
local record = stored and cjson.decode(stored) or {}
if record.state ~= 'done' or record.at ~= ARGV[1] then return end
local pending = { state = 'pending', mac = record.mac, at = now, ttl = 0, issue = {} }
redis.call('SET', KEYS[1], cjson.encode(pending), 'PX', ARGV[2])
return { now, record.mac }
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
 * Stores a new code, or keeps the present one if this service made it for the same purpose and enough of its life is left.
 *
 * KEYS: the code, the issue. ARGV: the new code, its TTL in ms, the purpose or '', the network that asks, the TTL in ms from
 * which the present code is kept. Returns the code and its TTL in ms.
 */
export const issueCode = `${readClock}
local previous, ttl = redis.call('GET', KEYS[1]), redis.call('PTTL', KEYS[1])
local issue = cjson.decode(redis.call('GET', KEYS[2]) or '{}')
local send = { at = now, network = ARGV[4] }
local is_own = issue.code == previous
if is_own and (issue.purpose or '') == ARGV[3] and ttl >= tonumber(ARGV[5]) then
  table.insert(issue.sends, send)
  redis.call('SET', KEYS[2], cjson.encode(issue), 'KEEPTTL')
  return { previous, ttl }
end
issue.replaced = nil
local new = { code = ARGV[1], purpose = ARGV[3] ~= '' and ARGV[3] or nil, sends = { send } }
if previous then
  local expires = ttl >= 0 and math.floor(now / 1000) + ttl or nil
  new.replaced = { code = previous, expires = expires, issue = is_own and issue or nil }
end
redis.call('SET', KEYS[2], cjson.encode(new), 'PX', ARGV[2])
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return { ARGV[1], tonumber(ARGV[2]) }
`

/**
 * Withdraws a code and puts the one that it has replaced back, with the life that is left of it. Nothing changes if a newer
 * code has come, or if another message has the same code.
 *
 * KEYS: the code, the issue. ARGV: the code to withdraw.
 */
export const withdrawCode = `${readClock}
local issue = cjson.decode(redis.call('GET', KEYS[2]) or '{}')
if redis.call('GET', KEYS[1]) ~= ARGV[1] or issue.code ~= ARGV[1] or #issue.sends > 1 then return end
local replaced = issue.replaced
local rest = replaced and replaced.expires and math.floor(replaced.expires - now / 1000)
if not replaced or rest and rest <= 0 then
  redis.call('DEL', KEYS[1], KEYS[2])
  return
end
local life = rest and { 'PX', rest } or {}
redis.call('SET', KEYS[1], replaced.code, unpack(life))
if replaced.issue then redis.call('SET', KEYS[2], cjson.encode(replaced.issue), unpack(life))
else redis.call('DEL', KEYS[2]) end
`
