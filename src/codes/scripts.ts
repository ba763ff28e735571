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
 * A full Redis refuses the first write of a script if it needs memory. So such a write comes first: a script then changes
 * everything or nothing.
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
-- Nobody learns anything about the code without a wrong code left, not even with the right one.
local budgets, wait, spent = {}, 0, 0
for n = 6, #ARGV, 3 do
  local field, max, window = ARGV[n], tonumber(ARGV[n + 1]), tonumber(ARGV[n + 2])
  local count, since = string.match(redis.call('HGET', KEYS[4], field) or '', '(%d+) (%d+)')
  if not count or now - since >= window then count, since = 0, now end
  table.insert(budgets, { field = field, count = tonumber(count), since = since })
  local rest = since + window - now
  if tonumber(count) >= max and rest > wait then wait, spent = rest, #budgets end
end
if wait > 0 then return { 'spent', wait, spent } end

local code = redis.call('GET', KEYS[1])
local issue = cjson.decode(redis.call('GET', KEYS[3]) or '{}')
-- A code of another service was asked for everything.
if issue.code ~= code then issue = { purposes = { any = true } } end
local fits = code == ARGV[1] and (issue.purposes.any or issue.purposes[ARGV[2]])

local stored = redis.call('GET', KEYS[2])
local claim = stored and cjson.decode(stored) or {}
local is_repeat = claim.code == ARGV[1] and claim.purpose == ARGV[2]
-- A request holds 123456, sends its INSERT, and dies. Nobody has released the code, so the next request must look for the row.
local may_have_written = is_repeat and (claim.may_have_written or claim['until'] > 0)

if not fits and not is_repeat then
  if code or stored then
    for _, budget in ipairs(budgets) do
      redis.call('HSET', KEYS[4], budget.field, budget.count + 1 .. ' ' .. budget.since)
    end
    redis.call('PEXPIRE', KEYS[4], 86400000)
  end
  return { 'wrong' }
end
if fits then
  -- It replaces the claim of an older code. But another service may have sent the same code again: then the claim still counts.
  may_have_written = may_have_written or is_repeat and claim.used_by
  claim = { code = ARGV[1], purpose = ARGV[2], sends = issue.sends }
elseif claim.used_by == '' then
  return { 'used_in_vain' }
elseif claim['until'] > now then
  return { 'in_progress' }
end

local life = redis.call('PTTL', fits and KEYS[1] or KEYS[2])
-- A code without a TTL, of another service, can be repeated for a day.
if life < 0 then life = 86400000 end
claim.holder, claim['until'], claim.may_have_written = ARGV[3], now + ARGV[4], may_have_written and true or nil
redis.call('SET', KEYS[2], cjson.encode(claim), 'PX', math.max(life, ARGV[5]))
if fits then
  redis.call('GETDEL', KEYS[1])
  redis.call('DEL', KEYS[3])
end
return { 'held', may_have_written and 1 or 0, claim.used_by or false }
`

/**
 * A request that holds a code ends. One that has lost it, because its lease expired and another request holds the code, or
 * because a newer code of the mobile was presented, changes nothing.
 *
 * KEYS: the claim, the guesses. ARGV: the id of the request, the shortest life of the claim in ms, and one of
 * - `unused`: nothing was written
 * - `may_have_written`: the result of the write is unknown
 * - `used`, and the id of the user: a success also forgets the wrong codes
 * - `used_in_vain`
 * - `wrong_password`: the row exists, and has another password. Two of them delete the claim, so that nobody can try passwords
 *   with one code.
 *
 * Returns nil if the request had lost the code, otherwise the sends of a code that is used for the first time, as JSON, or ''.
 */
export const releaseCode = `
local stored = redis.call('GET', KEYS[1])
local claim = stored and cjson.decode(stored) or {}
if claim.holder ~= ARGV[1] then return nil end
local sends = ''
claim.holder, claim['until'] = nil, 0
if ARGV[3] == 'may_have_written' then claim.may_have_written = true end
if ARGV[3] == 'used_in_vain' then claim.used_by = '' end
if ARGV[3] == 'used' then
  if claim.sends then sends = cjson.encode(claim.sends) end
  claim.used_by, claim.may_have_written, claim.sends = ARGV[4], nil, nil
end
if ARGV[3] == 'wrong_password' then claim.wrong_passwords = (claim.wrong_passwords or 0) + 1 end
if claim.wrong_passwords == 2 then
  redis.call('DEL', KEYS[1])
  return ''
end
redis.call('SET', KEYS[1], cjson.encode(claim), 'PX', math.max(redis.call('PTTL', KEYS[1]), ARGV[2]))
if ARGV[3] == 'used' then redis.call('DEL', KEYS[2]) end
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
local code, ttl = redis.call('GET', KEYS[1]), redis.call('PTTL', KEYS[1])
local issue = cjson.decode(redis.call('GET', KEYS[2]) or '{}')
if not code or issue.code ~= code or ttl < tonumber(ARGV[6]) then
  code, ttl = ARGV[1], tonumber(ARGV[2])
  issue = { code = code, purposes = {}, sends = {} }
end
issue.purposes[ARGV[3]] = true
table.insert(issue.sends, { id = ARGV[4], network = ARGV[5] })
redis.call('SET', KEYS[2], cjson.encode(issue), 'PX', ttl)
redis.call('SET', KEYS[1], code, 'PX', ttl)
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
