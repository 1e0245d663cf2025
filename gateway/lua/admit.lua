#!lua
-- Admit requests: all limits of each or none of them, decided one after the other on the server's clock.
--
-- Everything is read, then everything is decided, then everything is written: a script is atomic, but what it wrote
-- before an error stays. Requests of one batch see one another's reservations, and a count that several of them share
-- is read once and written once.
--
-- KEYS, for each request: its reservation, then the count of each limit.
-- ARGV: number of requests, seat lease ms, reservation ms; then for each request: id, number of limits, intent; then
--   for each limit:
--   rate:  'r', amount, capacity, units per period, period us      count: "<at us> <backlog us>"
--   quota: 'q', amount, capacity, four window starts s             count: "<window start s> <used>"
--   seats: 's', amount, capacity                                   count: sorted set, id -> expiry us
-- Returns, for each request: verdict, binding limit, wait us; then for each limit: remaining, reset us, window.
--   verdict 1 admitted, 0 refused (binding: the limit with the longest wait; wait -1: until another request ends),
--   2 admitted before under the same id, 3 given up before it arrived, 4 binding holds something that is no count.

local ADMITTED, REFUSED, REPEATED, GIVEN_UP, FOREIGN = 1, 0, 2, 3, 4
local GONE = '-' -- the mark of a request that its gateway has given up, see settle.lua

local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local now_text = string.format('%.0f', now) -- tostring() keeps 14 digits only
local seat_lease, reservation_ms = tonumber(ARGV[2]), ARGV[3]

local held = redis.call('MGET', unpack(KEYS)) -- a sorted set reads as absent here, and is counted below
local at_key, counts, reserved = {}, {}, {}
for i, key in ipairs(KEYS) do at_key[key] = held[i] end

-- GCRA in its leaky-bucket form (ITU-T I.371, annex A): the backlog is the time that it takes to drain what was taken.
-- Kept as an instant and a duration, the fraction of a microsecond survives: 10^12 tokens a minute are counted as well
-- as one request an hour.
local function rate(key)
  local text, at, backlog = at_key[key], nil, nil
  if not text then return {kind = 'r', backlog = 0} end
  at, backlog = string.match(text, '^(%d+) ([%d.e+-]+)$')
  backlog = tonumber(backlog)
  if not backlog then return nil end
  return {kind = 'r', backlog = math.max(0, backlog - math.max(0, now - at))}
end

-- A calendar window: the latest start that is not in the future. A window that the store has seen begin is never left
-- for an earlier one, whatever a clock does.
local function quota(key, starts)
  local text, window, used = at_key[key], nil, nil
  local index = 1
  while index < 3 and now >= starts[index + 1] * 1000000 do index = index + 1 end
  local count = {kind = 'q', window = starts[index], ends = starts[index + 1] * 1000000, used = 0}
  if text then
    window, used = string.match(text, '^(%d+) (-?%d+)$')
    window, used = tonumber(window), tonumber(used)
    if not used then return nil end
    if window >= count.window then count.window, count.used = window, used end
  end
  return count
end

local function seats(key)
  if at_key[key] then return nil end
  if redis.call('EXISTS', key) == 1 and redis.call('TYPE', key).ok ~= 'zset' then return nil end
  return {kind = 's', live = redis.call('ZCOUNT', key, '(' .. now_text, '+inf'), taken = {}}
end

local read = 3
local function argument() read = read + 1 return ARGV[read] end
local function number() return tonumber(argument()) end

local replies, key_index = {}, 0
for request = 1, tonumber(ARGV[1]) do
  key_index = key_index + 1
  local reservation, id, limits, intent = KEYS[key_index], argument(), number(), argument()
  local verdict, binding, longest = ADMITTED, 0, 0
  local takes, reply = {}, {0, 0, 0}
  local before = at_key[reservation] or reserved[reservation]
  if before then verdict = before == GONE and GIVEN_UP or REPEATED end

  for limit = 1, limits do
    key_index = key_index + 1
    local key, kind, amount, capacity = KEYS[key_index], argument(), number(), number()
    local count, take, wait = counts[key], {key = key, amount = amount}, nil
    if kind == 'r' then
      local units, period = number(), number()
      count = count or rate(key)
      if count then
        -- The tolerance is one part in 10^12: rounding, not room.
        local full = capacity * period / units * (1 + 1e-12)
        take.backlog, take.unit, take.full = amount * period / units, period / units, full
        if count.backlog + take.backlog > full then wait = count.backlog + take.backlog - full end
      end
    elseif kind == 'q' then
      local starts = {number(), number(), number(), number()}
      count = count or quota(key, starts)
      if count then
        take.capacity = capacity
        if count.used + amount > capacity then wait = math.max(1, count.ends - now) end
      end
    else
      count = count or seats(key)
      if count then
        take.capacity = capacity
        if count.live + amount > capacity then wait = -1 end
      end
    end
    if not count then
      verdict, binding = FOREIGN, limit
      take.foreign = true
    else
      counts[key] = count
      if wait and verdict <= ADMITTED then
        if verdict == ADMITTED or (longest >= 0 and wait > longest) then binding, longest = limit, wait end
        verdict = REFUSED
      end
    end
    take.count = count
    takes[limit] = take
  end

  if verdict == ADMITTED then
    reserved[reservation] = now_text .. ' ' .. intent
    for _, take in ipairs(takes) do
      local count = take.count
      if count.kind == 'r' then count.backlog = count.backlog + take.backlog
      elseif count.kind == 'q' then count.used = count.used + take.amount
      else
        count.live = count.live + take.amount
        count.taken[#count.taken + 1] = id
      end
      count.changed = true
    end
  end

  reply[1], reply[2], reply[3] = verdict, binding, math.ceil(longest)
  for _, take in ipairs(takes) do
    local count, remaining, reset, window = take.count, 0, 0, 0
    if not count then remaining = 0
    elseif count.kind == 'r' then
      remaining, reset = math.floor((take.full - count.backlog) / take.unit), math.ceil(count.backlog)
    elseif count.kind == 'q' then
      remaining, reset, window = take.capacity - count.used, math.max(0, count.ends - now), count.window
    else remaining = take.capacity - count.live end
    reply[#reply + 1] = math.max(0, remaining)
    reply[#reply + 1] = reset
    reply[#reply + 1] = window
  end
  replies[request] = reply
end

for key, count in pairs(counts) do
  if count.changed then
    if count.kind == 'r' then
      -- Gone when it would read as zero.
      redis.call('SET', key, string.format('%s %.17g', now_text, count.backlog), 'PX',
        string.format('%.0f', math.ceil(count.backlog / 1000) + 1000))
    elseif count.kind == 'q' then
      redis.call('SET', key, string.format('%.0f %.0f', count.window, count.used), 'PX',
        string.format('%.0f', math.ceil((count.ends - now) / 1000) + 1000))
    else
      redis.call('ZREMRANGEBYSCORE', key, '-inf', now_text)
      for _, id in ipairs(count.taken) do
        redis.call('ZADD', key, string.format('%.0f', now + seat_lease * 1000), id)
      end
      redis.call('PEXPIRE', key, seat_lease + 1000)
    end
  end
end
for key, intent in pairs(reserved) do redis.call('SET', key, intent, 'PX', reservation_ms) end
return replies
