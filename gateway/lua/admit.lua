#!lua
-- Admit requests: all limits of each or none of them, decided one after the other on the server's clock.
--
-- Everything is read, then everything is decided, then everything is written: a script is atomic, but what it wrote
-- before an error stays. Requests of one batch see one another's reservations, and a count that several of them share
-- is read once and written once.
--
-- KEYS, for each request: its reservation, then the count of each limit.
-- ARGV: the requests in MessagePack (one value is read several times faster than thirty), seat lease ms,
--   reservation ms. A request is {id, intent, limits}, a limit is
--   rate:  {'r', amount, capacity, units per period, period us}    count: "<at us> <backlog us> <us per unit>"
--   quota: {'q', amount, capacity, four window starts s}           count: "<window start s> <used>"
--   seats: {'s', amount, capacity}                                 count: sorted set, id -> expiry us
-- Returns, for each request: verdict, binding limit, wait us; then for each limit: remaining, reset us, window.
--   verdict 1 admitted, 0 refused (binding: the limit with the longest wait, one that waits for a seat has none),
--   2 admitted before under the same id, 3 given up before it arrived, 4 binding holds something that is no count.

local ADMITTED, REFUSED, REPEATED, GIVEN_UP, FOREIGN = 1, 0, 2, 3, 4
local GONE = '-' -- the mark of a request that its gateway has given up, see settle.lua
local LONGEST = 2 ^ 53 -- us, 285 years: what a double and an expiry can hold

local format, floor, ceil, min, max = string.format, math.floor, math.ceil, math.min, math.max
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local now_text = format('%.0f', now) -- tostring() keeps 14 digits only
local requests, seat_lease, reservation_ms = cmsgpack.unpack(ARGV[1]), ARGV[2], ARGV[3]
local held = redis.call('MGET', unpack(KEYS)) -- what is no string reads as absent

-- Three kinds of limit, and for each how its count is read (false: it is no count), how long a request has to wait
-- (nil: it fits), how it is taken, told and written.
local RATE, QUOTA, SEATS = {}, {}, {}
local KINDS = {r = RATE, q = QUOTA, s = SEATS}

-- GCRA in its leaky-bucket form (ITU-T I.371, annex A): the backlog is the time that it takes to drain what was taken.
-- Kept as an instant and a duration, the fraction of a microsecond survives: 10^12 tokens a minute are counted as well
-- as one request an hour.
function RATE.read(key, text, limit)
  if not text then return redis.call('EXISTS', key) == 0 and {backlog = 0, unit = limit[5] / limit[4]} end
  local at, backlog, unit = string.match(text, '^(%d+) ([%d.e+-]+) ([%d.e+-]+)$')
  backlog, unit = tonumber(backlog), tonumber(unit)
  if not (backlog and unit and unit > 0) then return false end
  return {backlog = max(0, backlog - max(0, now - at)), unit = unit}
end

-- Rounding is not refused, and is never a whole unit.
local function full(limit, unit)
  local exact = limit[3] * unit
  return exact + min(exact * 1e-12, unit / 2)
end

function RATE.wait(count, limit)
  local unit = limit[5] / limit[4]
  if count.unit ~= unit then -- another rate than before: what was taken is so many units, not so much time
    count.backlog, count.unit = count.backlog / count.unit * unit, unit
  end
  local over = count.backlog + limit[2] * unit - full(limit, unit)
  return over > 0 and ceil(over) or nil
end

function RATE.take(count, limit) count.backlog = count.backlog + limit[2] * count.unit end

function RATE.tell(count, limit)
  return floor((full(limit, count.unit) - count.backlog) / count.unit), ceil(count.backlog), 0
end

function RATE.write(key, count) -- gone when it would read as zero
  redis.call('SET', key, format('%s %.17g %.17g', now_text, count.backlog, count.unit),
    'PX', format('%.0f', min(count.backlog, LONGEST) / 1000 + 1000))
end

-- A calendar window: the latest start that is not in the future. A window that the store has seen begin is never left
-- for an earlier one, whatever a clock does.
function QUOTA.read(key, text, limit)
  local window, used = 0, 0
  if text then
    window, used = string.match(text, '^(%d+) (%d+)$')
    window, used = tonumber(window), tonumber(used)
    if not used then return false end
  elseif redis.call('EXISTS', key) == 1 then
    return false
  end
  local at, place = max(now, window * 1000000), 4
  while place < 6 and at >= limit[place + 1] * 1000000 do place = place + 1 end
  if window < limit[place] then window, used = limit[place], 0 end
  -- Kept for longer than any of the windows, whatever the clocks of the gateways say.
  return {window = window, used = used, ends = limit[place + 1] * 1000000, kept = limit[7] - limit[4]}
end

function QUOTA.wait(count, limit)
  return count.used + limit[2] > limit[3] and max(1, count.ends - now) or nil
end

function QUOTA.take(count, limit) count.used = count.used + limit[2] end

function QUOTA.tell(count, limit) return limit[3] - count.used, max(0, count.ends - now), count.window end

function QUOTA.write(key, count)
  redis.call('SET', key, format('%.0f %.0f', count.window, count.used), 'EX', format('%.0f', count.kept))
end

function SEATS.read(key)
  local live = redis.pcall('ZCOUNT', key, '(' .. now_text, '+inf')
  return type(live) == 'number' and {live = live, taken = {}}
end

function SEATS.wait(count, limit) return count.live + limit[2] > limit[3] and 0 or nil end

local expiry = format('%.0f', now + seat_lease * 1000)
function SEATS.take(count, limit, id)
  local taken = count.taken
  count.live, taken[#taken + 1], taken[#taken + 2] = count.live + limit[2], expiry, id
end

function SEATS.tell(count, limit) return limit[3] - count.live, 0, 0 end

function SEATS.write(key, count)
  redis.call('ZREMRANGEBYSCORE', key, '-inf', now_text)
  redis.call('ZADD', key, unpack(count.taken))
  redis.call('PEXPIRE', key, format('%.0f', seat_lease + 1000))
end

local counts, changed, reserved, replies, index = {}, {}, {}, {}, 1
for number, request in ipairs(requests) do
  local first, id, limits = index, request[1], request[3]
  local reservation = KEYS[first]
  local verdict, binding, longest = ADMITTED, 0, 0
  local before = held[first] or reserved[reservation]
  if before then verdict = before == GONE and GIVEN_UP or REPEATED end

  for place, limit in ipairs(limits) do
    index = first + place
    local key, kind = KEYS[index], KINDS[limit[1]]
    local count = counts[key]
    if count == nil then
      count = kind.read(key, held[index], limit)
      counts[key] = count
    end
    local wait = count and kind.wait(count, limit)
    if verdict <= ADMITTED then
      if not count then
        verdict, binding, longest = FOREIGN, place, 0
      elseif wait then
        if verdict == ADMITTED or wait > longest then binding, longest = place, wait end
        verdict = REFUSED
      end
    end
  end
  index = index + 1

  if verdict == ADMITTED then
    reserved[reservation] = now_text .. ' ' .. request[2]
    for place, limit in ipairs(limits) do
      local key, kind = KEYS[first + place], KINDS[limit[1]]
      kind.take(counts[key], limit, id)
      changed[key] = kind
    end
  end

  local reply = {verdict, binding, min(longest, LONGEST)}
  for place, limit in ipairs(limits) do
    local count, remaining, reset, window = counts[KEYS[first + place]], 0, 0, 0
    if count then remaining, reset, window = KINDS[limit[1]].tell(count, limit) end
    local size = #reply
    reply[size + 1], reply[size + 2], reply[size + 3] = max(0, remaining), min(reset, LONGEST), window
  end
  replies[number] = reply
end

for key, kind in pairs(changed) do kind.write(key, counts[key]) end
for reservation, intent in pairs(reserved) do redis.call('SET', reservation, intent, 'PX', reservation_ms) end
return replies
