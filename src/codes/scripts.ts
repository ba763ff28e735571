/*
 * The life of a code in Redis. Four Lua scripts, because a code and its claim must change in one step. A code has one place at
 * a time: it lies under `sms_code_<mobile>` until a request presents it, and then in its claim until the claim expires. It is
 * never put back.
 *
 * All keys are on the Cluster slot of the code:
 *
 * - The code, a plain string, which other services write, too.
 * - Its issue, JSON, if this service has made it:
 *     code       the code; if another service has written another code since, the issue does not apply
 *     purposes   for what it was asked: an object with `sign_up`, `password` or `any` as true
 *     sends      each message with the code: the `id` of its units in the limits on unused codes, and the `network` that asked
 * - Its claim, JSON:
 *     code, purpose     what was presented, and for what
 *     holder            the request that holds the code; absent if nobody does
 *     until             the end of its lease, in ms since 1970 by the clock of Redis; 0 if nobody holds the code
 *     may_have_written  true if a request that has died, or does not know its result, may have written to Postgres
 *     used_by           the id of the user for whom the code was used, or '' if it was used in vain: the mobile of a sign-up was
 *                       registered, or that of a reset was not
 *     wrong_passwords   how many repeats had a wrong password
 *     sends             those of its issue, until it is used
 * - The guesses, a hash. Each field is a budget of wrong codes: their number, and the start of the window in ms since 1970.
 *
 * A full Redis refuses a command that needs memory only until the script has written. So the first write of each script is one that
 * Redis can refuse: then the script changes everything or nothing.
 */

/** Defines `now`, in ms since 1970. */
const readClock = `
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
`

/**
 * A request presents a code, and holds it if it is right.
 *
 * KEYS: the code, the claim, the issue, the guesses. ARGV: the presented code, the purpose, an id of the request, the lease in
 * ms, the shortest life of a claim in ms, and for each budget of wrong codes its field, its maximum and its window in ms.
 *
 * Returns one of
 * - `{'spent', ms, number}`: until the budget with the longest wait has room again, and its number
 * - `{'held', 1 if an earlier request may have written, else 0, used_by or nil}`
 * - `{'in_progress'}`: another request holds the code
 * - `{'used_in_vain'}`
 * - `{'wrong'}`: absent, expired, for another purpose, or wrong
 */
export const holdCode = `${readClock}
local code_key, claim_key, issue_key, guesses_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local presented, purpose, holder, lease, shortest_life = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]

-- Check the limits first: when they are spent, even the right code gets 429.
local budgets, wait, spent = {}, 0, 0
for n = 6, #ARGV, 3 do
  local field, max, window = ARGV[n], tonumber(ARGV[n + 1]), tonumber(ARGV[n + 2])
  local count, since = string.match(redis.call('HGET', guesses_key, field) or '', '(%d+) (%d+)')
  if not count or now - since >= window then count, since = 0, now end
  table.insert(budgets, { field = field, count = tonumber(count), since = since })
  local remaining = since + window - now
  if tonumber(count) >= max and remaining > wait then wait, spent = remaining, #budgets end
end
if wait > 0 then return { 'spent', wait, spent } end

local code = redis.call('GET', code_key)
local issue = cjson.decode(redis.call('GET', issue_key) or '{}')
-- A code without an issue comes from another service, and serves every purpose.
if issue.code ~= code then issue = { purposes = { any = true } } end
local is_present = code == presented and (issue.purposes.any or issue.purposes[purpose])

local stored = redis.call('GET', claim_key)
local claim = stored and cjson.decode(stored) or {}
local is_repeat = claim.code == presented and claim.purpose == purpose
-- A request holds 123456, sends its INSERT, and dies. Nobody has released the code, so the next request must look for the row.
local was_never_released = is_repeat and claim['until'] > 0
local may_have_written = is_repeat and (claim.may_have_written or was_never_released)

if not is_present and not is_repeat then
  if code or stored then
    for _, budget in ipairs(budgets) do
      redis.call('HSET', guesses_key, budget.field, budget.count + 1 .. ' ' .. budget.since)
    end
    redis.call('PEXPIRE', guesses_key, 86400000)
  end
  return { 'wrong' }
end
if is_present then
  -- It replaces the claim of an older code. But another service may have sent the same code again: then the claim still counts.
  may_have_written = may_have_written or is_repeat and claim.used_by
  claim = { code = presented, purpose = purpose, sends = issue.sends }
elseif claim.used_by == '' then
  return { 'used_in_vain' }
elseif claim['until'] > now then
  return { 'in_progress' }
end

local ttl = redis.call('PTTL', is_present and code_key or claim_key)
-- A code without a TTL, of another service, can be repeated for a day.
if ttl < 0 then ttl = 86400000 end
claim.holder, claim['until'], claim.may_have_written = holder, now + lease, may_have_written and true or nil
redis.call('SET', claim_key, cjson.encode(claim), 'PX', math.max(ttl, shortest_life))
if is_present then
  redis.call('GETDEL', code_key)
  redis.call('DEL', issue_key)
end
return { 'held', may_have_written and 1 or 0, claim.used_by or false }
`

/**
 * A request that holds a code ends. One that has lost it, because its lease expired and another request holds the code, or
 * because a newer code of the mobile was presented, changes nothing.
 *
 * KEYS: the claim, the guesses. ARGV: the id of the request, the shortest life of the claim in ms, and one of
 * - `unused`: the next request may start again. An UPDATE can be repeated, so a reset says so after any failure.
 * - `may_have_written`: the result of the write is unknown
 * - `used`, and the id of the user: a success also forgets the wrong codes
 * - `used_in_vain`
 * - `wrong_password`: the row exists, and has another password. Two of them delete the claim, so that nobody can try passwords
 *   with one code.
 *
 * Returns nil if the request had lost the code, otherwise the sends of a code that is used for the first time, as JSON, or ''.
 */
export const releaseCode = `
local claim_key, guesses_key = KEYS[1], KEYS[2]
local holder, shortest_life, how, user_id = ARGV[1], ARGV[2], ARGV[3], ARGV[4]

local stored = redis.call('GET', claim_key)
local claim = stored and cjson.decode(stored) or {}
if claim.holder ~= holder then return nil end
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
    redis.call('DEL', claim_key)
    return ''
  end
end
redis.call('SET', claim_key, cjson.encode(claim), 'PX', math.max(redis.call('PTTL', claim_key), shortest_life))
if how == 'used' then redis.call('DEL', guesses_key) end
return sends
`

/**
 * Somebody asks for a code. The one that this service has made is sent again, if enough of its life is left, because people
 * type the first of two messages; it then serves the further purpose, too.
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
  code, ttl = new_code, tonumber(life)
  issue = { code = code, purposes = {}, sends = {} }
end
issue.purposes[purpose] = true
table.insert(issue.sends, { id = id, network = network })
redis.call('SET', issue_key, cjson.encode(issue), 'PX', ttl)
if is_new then redis.call('SET', code_key, code, 'PX', ttl) end
return { code, ttl }
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
