/*
 * What happens to a code in Redis, each step atomic: Lua, because a code and its attempt marker change together.
 *
 * KEYS[1] is the code. KEYS[2] is the marker on the same Cluster slot, JSON:
 *   state    pending, unknown (whether the user was registered) or done; absent if it only counts guesses
 *   mac      the keyed MAC of the code that the attempt took
 *   at       when it took the code, in µs of Redis's clock: tells one attempt from another
 *   ttl      the life that the code had left then, in ms; negative if it had no end
 *   guesses  wrong codes so far, for the code whose keyed hash is `of`
 *   user_id  of an attempt that is done
 *   checking when somebody began to ask with a password for the same success, until the answer
 *   passwords  the wrong ones among them
 *
 * A Redis that is full refuses a script's first write if that needs memory. So such a write comes first: either all of a
 * step happens or nothing.
 */

/**
 * ARGV: the presented code, the guesses that a code bears, the lease in µs, the marker's life in ms, the key for `of`,
 * the MACs of the presented code, of which the first is to be written.
 *
 * Returns `{'taken', at, ttl, 1 if an earlier attempt took this code, else 0}`, `{'in_progress'}`,
 * `{'done', user_id, at}` or `{'wrong'}`.
 */
export const takeCode = `
local code = redis.call('GET', KEYS[1])
local stored = redis.call('GET', KEYS[2])
local marker = stored and cjson.decode(stored) or {}
local life = tonumber(ARGV[4])
local time = redis.call('TIME')
local now = time[1] .. string.format('%06d', time[2])

local known = false
for n = 6, #ARGV do known = known or marker.mac == ARGV[n] end

local of = code and redis.sha1hex(ARGV[5] .. code)
if of and marker.of ~= of then marker.of, marker.guesses = of, 0 end

local function take(ttl)
  local pending =
    { state = 'pending', mac = ARGV[6], at = now, ttl = ttl, of = marker.of, guesses = marker.guesses }
  redis.call('SET', KEYS[2], cjson.encode(pending), 'PX', math.max(life, ttl))
  return { 'taken', now, ttl, known and 1 or 0 }
end

if code == ARGV[1] then
  local taken = take(redis.call('PTTL', KEYS[1]))
  redis.call('GETDEL', KEYS[1])
  return taken
end
if known then
  local since = marker.state == 'pending' and marker.at or marker.checking
  if since and now - since < tonumber(ARGV[3]) then return { 'in_progress' } end
  if marker.state ~= 'done' then return take(marker.ttl) end
  marker.checking = now
  redis.call('SET', KEYS[2], cjson.encode(marker), 'KEEPTTL')
  return { 'done', marker.user_id, marker.at }
end

local guessable = marker.state == 'pending' or marker.state == 'unknown'
if not code and not guessable then return { 'wrong' } end

marker.guesses = (marker.guesses or 0) + 1
if marker.guesses < tonumber(ARGV[2]) then
  local ttl = math.max(redis.call('PTTL', KEYS[2]), redis.call('PTTL', KEYS[1]))
  redis.call('SET', KEYS[2], cjson.encode(marker), 'PX', ttl > 0 and ttl or life)
else
  redis.call('DEL', KEYS[1])
  if marker.state ~= 'done' then redis.call('DEL', KEYS[2]) end
end
return { 'wrong' }
`

/**
 * Ends an attempt that has come to nothing. Where another has had its code since, the code and the marker are that one's;
 * where another code was done meanwhile, only its marker stays.
 *
 * ARGV: the attempt's `at`, `mac` and `ttl`, the marker's life in ms, the code if it goes back or '',
 * 1 if the work may be done after all, else 0. Returns 1, or 0 if another has had the code since.
 */
export const releaseCode = `
local stored = redis.call('GET', KEYS[2])
local marker = stored and cjson.decode(stored) or {}
local ours = not stored or marker.at == ARGV[1]
if marker.mac == ARGV[2] and not ours then return 0 end
local ttl, life = tonumber(ARGV[3]), tonumber(ARGV[4])
if ARGV[5] ~= '' and (ours or marker.state == 'done') then
  if ttl < 0 then redis.call('SET', KEYS[1], ARGV[5], 'NX')
  else redis.call('SET', KEYS[1], ARGV[5], 'PX', math.max(ttl, 1), 'NX') end
end
if not ours then return 1 end
local left = { of = marker.of, guesses = marker.guesses }
if ARGV[6] == '1' then
  left.state, left.mac, left.at, left.ttl = 'unknown', ARGV[2], ARGV[1], ttl
elseif ARGV[5] == '' or (left.guesses or 0) == 0 then
  redis.call('DEL', KEYS[2])
  return 1
end
redis.call('SET', KEYS[2], cjson.encode(left), 'PX', math.max(life, ttl))
return 1
`

/**
 * Ends what has begun with `{'done', …}`. The second wrong password ends the marker, too.
 *
 * KEYS[1] is the marker. ARGV: the attempt's `at`, 1 if the password was wrong, else 0.
 */
export const endReplay = `
local stored = redis.call('GET', KEYS[1])
local marker = stored and cjson.decode(stored) or {}
if marker.state ~= 'done' or marker.at ~= ARGV[1] then return end
marker.checking = nil
marker.passwords = (marker.passwords or 0) + ARGV[2]
if marker.passwords < 2 then redis.call('SET', KEYS[1], cjson.encode(marker), 'KEEPTTL')
else redis.call('DEL', KEYS[1]) end
`

/**
 * A new code. Its guesses start anew by themselves, as they are counted for another one.
 *
 * KEYS[1] is the code. ARGV: the new one, its life in ms. Returns the one that it replaces, or nil, and what life that had
 * left.
 */
export const issueCode = `
local former, ttl = redis.call('GET', KEYS[1]), redis.call('PTTL', KEYS[1])
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return { former, ttl }
`

/**
 * ARGV: the code that goes, the one that comes back or '', its life in ms. A code that has come since stays.
 */
export const withdrawCode = `
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return end
local ttl = tonumber(ARGV[3])
if ARGV[2] == '' then redis.call('DEL', KEYS[1])
elseif ttl < 0 then redis.call('SET', KEYS[1], ARGV[2])
else redis.call('SET', KEYS[1], ARGV[2], 'PX', math.max(ttl, 1)) end
`
