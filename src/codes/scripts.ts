/*
 * The life of a code in Redis. Lua scripts, because a code and its claim must change in one step. A code has one place at
 * a time: it lies under `sms_code_<mobile>` until a request presents it, and then in its claim until the claim expires. It is
 * never put back.
 *
 * All keys are on the Cluster slot of the code:
 *
 * - The code, a plain string, which other services write, too.
 * - Its issue, JSON, if this service has made it:
 *     code       the code; if another service has written another code since, the issue does not apply
 *     purposes   for what it was asked while it lived: an object with each purpose, or `any`, as true
 *     sends      each message with the code: the `id` of its units in the limits on unused codes, and the `network` that asked
 * - Its claim, JSON:
 *     code, purpose     the code, and for what it was presented
 *     holder            the request that holds the code; absent if nobody does
 *     until             the end of its lease, in ms since 1970 by the clock of Redis; 0 if nobody holds the code
 *     may_have_written  true if a request that has died, or does not know its result, may have written to Postgres
 *     used_by           the id of the user for whom the code was used, after a login with the session epoch, or '' if it was used in
 *                       vain: the mobile of a sign-up was registered, or that of another purpose was not
 *     wrong_passwords   how many repeats had a wrong password
 *     sends             those of its issue, until it is used
 * - The guesses, a hash. Each field is a budget of wrong codes: their number, and the end of the window in ms since 1970. It lives as
 *   long as its longest window. If there was never anything to guess, it lives for ten minutes, so that strangers cannot fill Redis.
 *
 * The limits on wrong codes over all mobiles (limits.ts) are on another slot. In a Cluster codes.ts changes them in a step of their own.
 *
 * A full Redis refuses a command that needs memory only until the script has written. So the first write of each script is one that
 * Redis can refuse: then the script changes everything or nothing.
 */

/** How long a wrong code counts where there is nothing to guess. */
const guessesTtlMs = 600_000

/**
 * A request presents a code, and holds it if it is right.
 *
 * KEYS: the code, the claim, the issue, the guesses; then the limits on wrong codes over all mobiles.
 *
 * ARGV:
 * - the presented text, and its six digits, or '' if it cannot be a code of this service
 * - the purpose, and an id of the request
 * - the lease, and the shortest life of a claim, in ms
 * - for each limit: its maximum, and its window in ms
 * - for each budget of wrong codes: its field, its maximum, and its window in ms
 *
 * Returns one of
 * - `{'spent', ms, number}`: until the limit or budget with the longest wait has room again, and its number; limits come first
 * - `{'held', 1 if an earlier request may have written, else 0, used_by or nil}`
 * - `{'in_progress'}`: another request holds the code
 * - `{'used_in_vain'}`
 * - `{'wrong', 1 if it was counted, else 0}`: absent, expired, for another purpose, or wrong
 */
export const holdCode = `
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local code_key, claim_key, issue_key, guesses_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local presented, digits, purpose, holder, lease, shortest_life = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local next_argument = 7

-- Check the limits first: when they are spent, even the right code gets 429.
local limits, budgets, wait, spent = {}, {}, 0, 0
local function note_spent(remaining)
  if remaining > wait then wait, spent = remaining, #limits + #budgets end
end
for n = 5, #KEYS do
  local max, window = tonumber(ARGV[next_argument]), tonumber(ARGV[next_argument + 1])
  table.insert(limits, { key = KEYS[n], window = window })
  if redis.call('ZCOUNT', KEYS[n], '(' .. now - window, '+inf') >= max then
    note_spent(redis.call('ZRANGE', KEYS[n], -max, -max, 'WITHSCORES')[2] + window - now)
  end
  next_argument = next_argument + 2
end
for n = next_argument, #ARGV, 3 do
  local field, max, window = ARGV[n], tonumber(ARGV[n + 1]), tonumber(ARGV[n + 2])
  local count, window_end = string.match(redis.call('HGET', guesses_key, field) or '0 0', '(%d+) (%d+)')
  if tonumber(window_end) <= now then count, window_end = 0, now + window end
  table.insert(budgets, { field = field, count = tonumber(count), window_end = tonumber(window_end) })
  if tonumber(count) >= max then note_spent(math.min(window_end - now, redis.call('PTTL', guesses_key))) end
end
if wait > 0 then return { 'spent', wait, spent } end

local code = redis.call('GET', code_key)
local issue = cjson.decode(redis.call('GET', issue_key) or '{}')
-- A code without an issue comes from another service, and serves every purpose.
if issue.code ~= code then issue = { purposes = { any = true } } end
local stored = redis.call('GET', claim_key)
local claim = stored and cjson.decode(stored) or {}

-- People type 123-456 or 123456123456. A code of another service may be any text.
local function matches(other) return other == presented or digits ~= '' and other == digits end
local matches_code, matches_claim = matches(code), matches(claim.code)
local may_move = matches_code and (issue.purposes.any or issue.purposes[purpose])
local is_repeat = matches_claim and claim.purpose == purpose
-- A request holds 123456, sends its INSERT, and dies. Nobody has released the code, so the next request must look for the row.
local was_never_released = is_repeat and claim['until'] > 0
local may_have_written = is_repeat and (claim.may_have_written or was_never_released)

if not may_move and not is_repeat then
  -- A used code is nothing to guess: 429 must not tell that the mobile has just signed up.
  local is_unused = stored and not claim.used_by
  local is_foreign = code and not issue.code or is_unused and not claim.sends
  -- Two things cost no try: the right code for another purpose, and a text that cannot be a code.
  if matches_code or matches_claim or digits == '' and not is_foreign then return { 'wrong', 0 } end
  for _, limit in ipairs(limits) do
    redis.call('ZADD', limit.key, now, holder)
    redis.call('ZREMRANGEBYSCORE', limit.key, '-inf', now - limit.window)
    redis.call('PEXPIRE', limit.key, limit.window)
  end
  local ttl, is_new_window = math.max(redis.call('PTTL', guesses_key), ${guessesTtlMs}), false
  for _, budget in ipairs(budgets) do
    redis.call('HSET', guesses_key, budget.field, budget.count + 1 .. ' ' .. budget.window_end)
    if code or is_unused then ttl = math.max(ttl, budget.window_end - now) end
    is_new_window = is_new_window or budget.count == 0
  end
  redis.call('PEXPIRE', guesses_key, ttl)
  -- Strangers change their address, and each one is a field.
  local fields = is_new_window and redis.call('HGETALL', guesses_key) or {}
  for n = 1, #fields, 2 do
    if tonumber(string.match(fields[n + 1], '%d+$')) <= now then redis.call('HDEL', guesses_key, fields[n]) end
  end
  return { 'wrong', 1 }
end
if may_move then
  -- It replaces the claim of an older code. But another service may have sent the same code again: then the claim still counts.
  may_have_written = may_have_written or is_repeat and claim.used_by
  claim = { code = code, purpose = purpose, sends = issue.sends }
elseif claim.used_by == '' then
  return { 'used_in_vain' }
elseif claim['until'] > now then
  return { 'in_progress' }
end

local ttl = redis.call('PTTL', may_move and code_key or claim_key)
-- A code without a TTL, of another service, can be repeated for a day.
if ttl < 0 then ttl = 86400000 end
claim.holder, claim['until'], claim.may_have_written = holder, now + lease, may_have_written and true or nil
redis.call('SET', claim_key, cjson.encode(claim), 'PX', math.max(ttl, shortest_life))
if may_move then
  redis.call('GETDEL', code_key)
  redis.call('DEL', issue_key)
end
return { 'held', may_have_written and 1 or 0, claim.used_by or false }
`

/**
 * A request that holds a code ends. One that has lost it, because its lease expired and another request holds the code, or
 * because a newer code of the mobile was presented, changes nothing.
 *
 * KEYS: the claim, the guesses, the limits on wrong codes over all mobiles. ARGV: the id of the request, the shortest life of the
 * claim in ms, and one of
 * - `unused`: the next request may start again. An UPDATE can be repeated, so a reset says so after any failure.
 * - `may_have_written`: the result of the write is unknown
 * - `used`, and the id of the user: a success also forgets the wrong codes, and the first one refunds a unit of each limit, so that
 *   they do not limit honest traffic
 * - `used_in_vain`
 * - `wrong_password`: the row exists, and has another password. Nobody can try passwords with one code: the second one deletes the
 *   claim of a used code. An unused code was used in vain, and nobody knew it: the same request gets the same 409 (G5).
 *
 * Returns nil if the request had lost the code, otherwise the sends of a code that is used for the first time, as JSON, or ''.
 */
export const releaseCode = `
local claim_key, guesses_key = KEYS[1], KEYS[2]
local holder, shortest_life, how, user_id = ARGV[1], ARGV[2], ARGV[3], ARGV[4]

local stored = redis.call('GET', claim_key)
local claim = stored and cjson.decode(stored) or {}
if claim.holder ~= holder then return nil end
local is_first_use = how == 'used' and not claim.used_by
local sends = ''
claim.holder, claim['until'] = nil, 0
if how == 'may_have_written' then claim.may_have_written = true
elseif how == 'used_in_vain' then claim.used_by = ''
elseif how == 'used' then
  if claim.sends then sends = cjson.encode(claim.sends) end
  claim.used_by, claim.may_have_written, claim.sends = user_id, nil, nil
elseif how == 'wrong_password' then
  claim.wrong_passwords = (claim.wrong_passwords or 0) + 1
  if claim.wrong_passwords == 2 then
    if claim.used_by then
      redis.call('DEL', claim_key)
      return ''
    end
    claim.used_by = ''
  end
end
redis.call('SET', claim_key, cjson.encode(claim), 'PX', math.max(redis.call('PTTL', claim_key), shortest_life))
if how == 'used' then redis.call('DEL', guesses_key) end
for n = 3, is_first_use and #KEYS or 0 do redis.call('ZPOPMAX', KEYS[n]) end
return sends
`

/**
 * Somebody asks for a code. The one that this service has made is sent again, if enough of its life is left, because people
 * type the first of two messages; it then serves the further purpose, too. A new code that replaces it serves all of its purposes:
 * otherwise a stranger who asks for another one makes the code of the owner useless.
 *
 * KEYS: the code, the issue. ARGV: a new code, its TTL in ms, the purpose or `any`, the id and the network of the send, the TTL
 * in ms from which the present code is sent again. Returns the code and its TTL in ms.
 */
export const issueCode = `
local code_key, issue_key = KEYS[1], KEYS[2]
local new_code, life, purpose, id, network, shortest_ttl = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]

local code, ttl = redis.call('GET', code_key), redis.call('PTTL', code_key)
local issue = cjson.decode(redis.call('GET', issue_key) or '{}')
local is_new = not code or issue.code ~= code or ttl < tonumber(shortest_ttl)
if is_new then
  -- A code of another service serves everything.
  local purposes = issue.code == code and issue.purposes or code and { any = true } or {}
  issue = { code = new_code, purposes = purposes, sends = {} }
  code, ttl = new_code, tonumber(life)
end
issue.purposes[purpose] = true
table.insert(issue.sends, { id = id, network = network })
redis.call('SET', issue_key, cjson.encode(issue), 'PX', ttl)
if is_new then redis.call('SET', code_key, code, 'PX', ttl) end
return { code, ttl }
`

/**
 * Somebody asks for a code, and a limit refuses. The present code of this service serves the purpose all the same: otherwise strangers
 * who spend the limits decide for what the owner's code works.
 *
 * KEYS: the code, the issue. ARGV: the purpose or `any`.
 */
export const addPurpose = `
local issue = cjson.decode(redis.call('GET', KEYS[2]) or '{}')
if issue.code and issue.code == redis.call('GET', KEYS[1]) and not issue.purposes[ARGV[1]] then
  issue.purposes[ARGV[1]] = true
  redis.call('SET', KEYS[2], cjson.encode(issue), 'KEEPTTL')
end
`

/**
 * The only message with a code was certainly not sent, so nobody has the code. It is deleted, unless it was sent again, or
 * replaced or presented meanwhile.
 *
 * KEYS: the code, the issue. ARGV: the code.
 */
export const withdrawCode = `
local issue = cjson.decode(redis.call('GET', KEYS[2]) or '{}')
if redis.call('GET', KEYS[1]) == ARGV[1] and issue.code == ARGV[1] and #issue.sends == 1 then
  redis.call('DEL', KEYS[1], KEYS[2])
end
`
