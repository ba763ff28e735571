/*
 * What happens to a code in Redis, each step atomic: Lua, because a code and its attempt marker change together.
 *
 * KEYS[1] is the code. KEYS[2] is the marker on the same Cluster slot, JSON:
 *   state    pending, unknown (whether the user was registered) or done; absent if it only counts guesses
 *   mac      the keyed MAC of the code that the attempt took
 *   at       when it took the code, in µs of Redis's clock: tells one attempt from another
 *   ttl      the life that the code had left then, in ms; negative if it had no end
 *   user_id  of a sign-up that is done
 *   guesses  wrong codes so far; `of` is the keyed hash of the code in place that they missed
 *   passwords  wrong ones for a sign-up that is done
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

local function take(ttl)
  local pending = { state = 'pending', mac = ARGV[6], at = now, ttl = ttl }
  redis.call('SET', KEYS[2], cjson.encode(pending), 'PX', math.max(life, ttl))
  return { 'taken', now, ttl, known and 1 or 0 }
end

if code == ARGV[1] then
  local taken = take(redis.call('PTTL', KEYS[1]))
  redis.call('GETDEL', KEYS[1])
  return taken
end
if known then
  if marker.state == 'done' then return { 'done', marker.user_id, marker.at } end
  if marker.state == 'pending' and now - marker.at < tonumber(ARGV[3]) then return { 'in_progress' } end
  return take(marker.ttl)
end

local guessable = marker.state == 'pending' or marker.state == 'unknown'
if not code and not guessable then return { 'wrong' } end

local of = code and redis.sha1hex(ARGV[5] .. code)
if of and marker.of ~= of then marker.of, marker.guesses = of, 0 end
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
 * Ends an attempt that has registered nobody, unless the marker has become another's.
 *
 * ARGV: the attempt's `at`, `mac` and `ttl`, the marker's life in ms, the code if it goes back or '',
 * 1 if the user may be registered after all, else 0.
 */
export const releaseCode = `
local stored = redis.call('GET', KEYS[2])
if stored and cjson.decode(stored).at ~= ARGV[1] then return end
local ttl = tonumber(ARGV[3])
if ARGV[5] ~= '' then
  if ttl > 0 then redis.call('SET', KEYS[1], ARGV[5], 'PX', ttl, 'NX')
  else redis.call('SET', KEYS[1], ARGV[5], 'NX') end
end
if ARGV[6] == '1' then
  local unknown = { state = 'unknown', mac = ARGV[2], at = ARGV[1], ttl = ttl }
  redis.call('SET', KEYS[2], cjson.encode(unknown), 'PX', math.max(tonumber(ARGV[4]), ttl))
else
  redis.call('DEL', KEYS[2])
end
`

/**
 * Counts a wrong password for a sign-up that is done; the second ends its replay.
 *
 * KEYS[1] is the marker. ARGV: the sign-up's `at`.
 */
export const countWrongPassword = `
local stored = redis.call('GET', KEYS[1])
local marker = stored and cjson.decode(stored) or {}
if marker.state ~= 'done' or marker.at ~= ARGV[1] then return end
if marker.passwords then
  redis.call('DEL', KEYS[1])
else
  marker.passwords = 1
  redis.call('SET', KEYS[1], cjson.encode(marker), 'KEEPTTL')
end
`
