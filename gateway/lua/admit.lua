-- Admit requests: all limits of each or none of them, decided one after the other on the server's clock.
--
-- Everything is read, then everything is decided, then everything is written: a script is atomic, but what it wrote
-- before an error stays. Requests of one batch see one another's reservations, and a count that several of them share
-- is read once and written once.
--
-- KEYS, for each request: its reservation, the live requests of its organisation, then the count of each limit.
-- ARGV: the requests in MessagePack, seat lease ms, reservation ms. A request is {id ('': it only looks), intent,
--   limits}, a limit is {kind, amount, capacity, flags, then}
--   rate 'r':    units per period, period us
--   quota 'q':   a window's nominal length s, four window starts s, thresholds in units, ascending
--   rolling 'w': stretch us, thresholds
--   seats 's':   nothing
--   Flags: 1 what is taken is held until it is settled; 2 the limit is in shadow.
-- What is admitted is written down before it is served: the reservation is '<now us> <intent>\n<progress>', and the
-- request lives, with a lease as long as a seat's, until it is settled or swept.
-- Returns, for each request: verdict, binding limit, wait us, soonest us; then for each limit: remaining, reset us,
--   window, held, flags.
--   verdict 1 admitted, 0 refused (binding: the limit that is the last to open even if all that is held comes back,
--   and of several the one with the longest wait; one that waits for a seat has none, both are of it),
--   2 admitted before under the same id, 3 ended before it arrived, 4 binding holds something that is no count,
--   5 looked: the rest says what would be.
--   It fits after `wait` if nothing that is held comes back early, after `soonest` if all of it comes back now.
--   flags: 1 the limit is in shadow and would have refused, nothing was taken of it; the rest (/ 2) is the number of
--   the highest threshold that this request was the first to reach.

local ADMITTED, REFUSED, REPEATED, GIVEN_UP, FOREIGN, LOOKED = 1, 0, 2, 3, 4, 5

local now_text = format('%.0f', now) -- tostring() keeps 14 digits only
local requests, seat_lease, reservation_ms = cmsgpack.unpack(ARGV[1]), ARGV[2], ARGV[3]

-- For each kind: how its count is begun (false: it is no count), how long a request has to wait and how long at least
-- (nil: it fits), how it is taken (returns the threshold that is reached), told and written.

function RATE.open(key, text, limit)
  local unit = limit[6] / limit[5]
  local count = RATE.read(key, text, unit)
  if not count then return false end
  local fill = limit[3] * unit
  count.fill = fill
  if now - count.at >= fill then
    count.held, count.earlier, count.drained, count.since = 0, 0, 0, now
  elseif now - count.since >= fill then
    count.drained = max(0, count.drained - count.earlier * unit)
    count.held, count.earlier, count.since = 0, count.held, now
  end
  return count
end

-- How many units there is room for. Rounding is not refused, and is never a whole unit.
local function room(count)
  return (count.fill + min(count.fill * 1e-12, count.unit / 2) - count.backlog) / count.unit
end

function RATE.wait(count, limit)
  local over = (limit[2] - room(count)) * count.unit
  if over > 0 then
    return ceil(over), floor(max(0, over - max(0, (count.held + count.earlier) * count.unit - count.drained)))
  end
end

function RATE.take(count, limit)
  count.backlog = count.backlog + limit[2] * count.unit
  if flag(limit[4], HOLDS) then
    if count.held + count.earlier == 0 then count.since = now end
    count.held = count.held + limit[2]
  end
  return 0
end

function RATE.tell(count)
  return floor(room(count)), ceil(count.backlog), 0, count.held + count.earlier
end

-- The place of each quota's window among the starts of its limit.
local places = {}
local STARTS, STARTS_END = 6, 9

-- The latest window whose start is not in the future. One that the store has seen begin is never left for an earlier
-- one, whatever a clock does.
function QUOTA.open(key, text, limit)
  local count = QUOTA.read(key, text)
  if not count then return false end
  local at, place = max(now, count.window * 1000000), STARTS
  while place < STARTS_END - 1 and at >= limit[place + 1] * 1000000 do place = place + 1 end
  if count.window < limit[place] then
    QUOTA.begin(count, limit[place], place > STARTS and limit[place - 1], limit[3], limit[5])
  end
  places[count] = place
  return count
end

-- Until there is room for so many units that do not fit now: as many windows have to begin as their capacity holds.
local function windows(count, limit, over)
  if over <= 0 then return 0 end
  local place = places[count] + ceil(over / limit[3])
  local start = limit[min(place, STARTS_END)] + max(0, place - STARTS_END) * limit[5]
  return max(1, start * 1000000 - now)
end

function QUOTA.wait(count, limit)
  local over = count.used + limit[2] - limit[3]
  if over > 0 then return windows(count, limit, over), windows(count, limit, over - QUOTA.held(count)) end
end

function QUOTA.take(count, limit)
  count.used = count.used + limit[2]
  if flag(limit[4], HOLDS) then count.held = count.held + limit[2] end
  local number = reached(limit, STARTS_END + 1, count.used - QUOTA.held(count), count.told)
  if number > 0 then count.told = number end
  return number
end

function QUOTA.tell(count, limit)
  local ends = limit[places[count] + 1] * 1000000
  return limit[3] - count.used, max(0, ends - now), count.window, QUOTA.held(count)
end

function QUOTA.write(key, count, limit) QUOTA.keep(key, count, limit[3], limit[5]) end

if rolls then
  function ROLLING.open(key, text, limit) return ROLLING.read(key, text, limit[5], limit[3]) end

  -- How long it takes until so many units fit, with what is held or without it: let buckets fall out until they do.
  local function falling(count, amount, held)
    local copy = {list = {}, first = 1, capacity = count.capacity, debt = count.debt, used = 0, held = 0}
    local list = count.list
    for i = count.first, #list, 3 do
      ROLLING.put(copy, list[i], list[i + 1] - (held and 0 or list[i + 2]), 0)
    end
    ROLLING.absorb(copy, count.running)
    local bucket = 0
    while copy.used + copy.debt + amount > copy.capacity and copy.first < #copy.list do
      bucket = ROLLING.fall(copy, LONGEST)
    end
    return bucket == 0 and 0 or max(1, bucket * count.width - now)
  end

  function ROLLING.wait(count, limit)
    if count.used + count.debt + limit[2] > limit[3] then
      return falling(count, limit[2], true), falling(count, limit[2], false)
    end
  end

  function ROLLING.take(count, limit)
    ROLLING.put(count, count.running, limit[2], flag(limit[4], HOLDS) and limit[2] or 0)
    local number = reached(limit, 6, count.used + count.debt - count.held, count.told)
    if number > 0 then count.told, count.told_in = number, count.running end
    return number
  end

  -- It is full again when the newest bucket of which something is used has fallen out, and no debt is left.
  function ROLLING.tell(count, limit)
    local list, last, reset = count.list, #count.list - 2, 0
    while last >= count.first and list[last + 1] == 0 do last = last - 3 end
    if count.debt > 0 then
      reset = falling(count, limit[3], true)
    elseif last >= count.first then
      reset = (list[last] + COUNTING) * count.width - now
    end
    return limit[3] - count.used - count.debt, reset, count.running, count.held
  end
end

function SEATS.open(key)
  local live = redis.pcall('ZCOUNT', key, '(' .. now_text, '+inf')
  return type(live) == 'number' and {live = live, taken = {}}
end

function SEATS.wait(count, limit)
  if count.live + limit[2] > limit[3] then return 0, 0 end
end

local expiry = format('%.0f', now + seat_lease * 1000)
function SEATS.take(count, limit, id)
  local taken = count.taken
  count.live, taken[#taken + 1], taken[#taken + 2] = count.live + limit[2], expiry, id
  return 0
end

function SEATS.tell(count, limit) return limit[3] - count.live, 0, 0, 0 end

function SEATS.write(key, count)
  redis.call('ZREMRANGEBYSCORE', key, '-inf', now_text)
  redis.call('ZADD', key, unpack(count.taken))
  redis.call('PEXPIRE', key, format('%.0f', seat_lease + 1000))
end

local counts, changed, reserved, living, replies, index = {}, {}, {}, {}, {}, 1
for number, request in ipairs(requests) do
  local first, id, limits = index + 1, request[1], request[3]
  local reservation, live = KEYS[index], KEYS[first]
  local verdict, binding, longest, soonest, flags = ADMITTED, 0, -1, 0, {}
  local before = id ~= '' and (found[index] or reserved[reservation])

  for place, limit in ipairs(limits) do
    local key, kind = KEYS[first + place], KINDS[limit[1]]
    local count = counts[key]
    if count == nil then
      count = kind.open(key, found[first + place], limit)
      counts[key] = count
    end
    local wait, least = nil, nil
    if count then wait, least = kind.wait(count, limit) end
    flags[place] = 0
    if flag(limit[4], SHADOW) then
      if wait or not count then flags[place] = 1 end
    elseif not count and verdict ~= FOREIGN then
      verdict, binding, longest, soonest = FOREIGN, place, 0, 0
    elseif wait and verdict ~= FOREIGN then
      verdict = REFUSED
      if least > soonest or least == soonest and wait > longest then
        binding, longest, soonest = place, wait, least
      end
    end
  end
  index = first + #limits + 1
  if before then
    verdict, binding, longest, soonest = string.find(before, '^%d') and REPEATED or GIVEN_UP, 0, 0, 0
  elseif id == '' then
    verdict = LOOKED
  elseif verdict == ADMITTED then
    reserved[reservation] = now_text .. ' ' .. request[2] .. '\n'
    local leases = living[live] or {}
    leases[#leases + 1], leases[#leases + 2], living[live] = expiry, id, leases
    for place, limit in ipairs(limits) do
      if flags[place] == 0 then
        local key, kind = KEYS[first + place], KINDS[limit[1]]
        flags[place] = 2 * kind.take(counts[key], limit, id)
        changed[key] = limit
      end
    end
  end

  local reply = {verdict, binding, min(max(0, longest), LONGEST), min(soonest, LONGEST)}
  for place, limit in ipairs(limits) do
    local count, remaining, reset, window, held = counts[KEYS[first + place]], 0, 0, 0, 0
    if count then remaining, reset, window, held = KINDS[limit[1]].tell(count, limit) end
    local size = #reply
    reply[size + 1], reply[size + 2], reply[size + 3] = max(0, remaining), min(reset, LONGEST), window
    reply[size + 4], reply[size + 5] = held, flags[place]
  end
  replies[number] = reply
end

for key, limit in pairs(changed) do KINDS[limit[1]].write(key, counts[key], limit) end
for reservation, intent in pairs(reserved) do redis.call('SET', reservation, intent, 'PX', reservation_ms) end
for live, leases in pairs(living) do
  redis.pcall('ZADD', live, unpack(leases)) -- what else stands there is foreign: nothing of it is swept then
  redis.call('PEXPIRE', live, reservation_ms)
end
return replies
