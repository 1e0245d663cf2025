-- Settle requests: append the row to the ledger, give back the seat, correct every limit by (used - reserved), add the
-- hourly sums. The reservation is the right to do so, and is deleted with it: who comes second changes nothing.
--
-- KEYS, for each request: its reservation, the ledger stream, then each count that is corrected.
-- ARGV: the requests in MessagePack, mark ms. A request is {id, row ('' for none), field of the sums, what each of
--   COUNTERS grows by, corrections, unreserved}, a correction is {kind, difference, amount that was taken, flags, then}
--   rate 'r':    units per period, period us
--   quota 'q':   capacity, a window's nominal length s, window as admit.lua told it (0: nobody was told), thresholds
--   rolling 'w': capacity, stretch us, window as above, thresholds
--   seats 's':   nothing
--   Flags: 1 what was taken is held until now. Unreserved is 1 of a request that was served while the store was away:
--   where nothing is known of it, what it used is counted now.
-- The sums stand in '<ledger stream>:<hour>', hours since 1970 in UTC, on the ledger's own slot.
-- Returns, for each request: 1 settled, -1 its row cannot be written and nothing has changed, 0 nothing was reserved
-- under this id (any more). Then the id is marked as given up, so that an admission that is still on its way takes
-- nothing. After it, for each threshold that is reached first by this: the place of its correction, its number, and
-- what is used without what is held.

local SETTLED, ABSENT, UNWRITTEN = 1, 0, -1
local COUNTERS = {'requests', 'input_tokens', 'cached_tokens', 'output_tokens', 'cost_microusd'}
local GONE = '-'

local requests, mark_ms = cmsgpack.unpack(ARGV[1]), ARGV[2]
local hour = format(':%.0f', floor(time[1] / 3600))

-- For each kind: how its count is begun (false: there is none to correct), corrected, charged with units that nobody
-- has reserved, and written. `at` is when the request was reserved. What corrects or charges returns the threshold that
-- is reached, and what has reached it.
function RATE.open(key, text, correction) return RATE.read(key, text, correction[6] / correction[5]) end

function RATE.correct(count, correction, at)
  local difference, amount, unit = correction[2], correction[3], count.unit
  local passed, taken = max(0, now - at), amount * unit
  local drained = min(passed, taken)
  if passed >= count.fill then -- all of it, and it is held no longer
    drained = taken
  elseif flag(correction[4], HOLDS) then
    local generation = at >= count.since and 'held' or 'earlier'
    count[generation] = max(0, count[generation] - amount)
    drained = min(drained, count.drained)
    count.drained = count.drained - drained
  end
  count.backlog = max(0, count.backlog + max(difference * unit, drained - taken))
  return 0
end

function RATE.owe(count, _, units)
  count.backlog = count.backlog + units * count.unit
  return 0
end

-- A window that the gateway says has begun has, unless that is in the future; without one, it begins now.
function QUOTA.open(key, text, correction)
  local count, window = QUOTA.read(key, text), correction[7]
  if not count then return false end
  if window * 1000000 > now then window = 0 end
  if count.window == 0 then
    count.window = window > 0 and window or floor(now / 1000000)
  elseif window > count.window then
    QUOTA.begin(count, window, nil, correction[5], correction[6])
  end
  return count
end

function QUOTA.correct(count, correction, at)
  local difference, window = correction[2], correction[7]
  local held = flag(correction[4], HOLDS) and correction[3] or 0
  if window == 0 then
    window = at >= count.window * 1000000 and count.window or at >= count.before * 1000000 and count.before
  end
  if window == count.window then
    count.held = max(0, count.held - held)
  elseif window == count.before then -- what it gives back was carried out of it, or has ended with it
    difference = max(difference, -count.carried)
    count.carried, count.late = count.carried + min(0, difference), max(0, count.late - held)
  else
    difference = max(0, difference)
  end
  return QUOTA.owe(count, correction, difference)
end

function QUOTA.owe(count, correction, units)
  count.used = max(0, count.used + units)
  local settled = count.used - QUOTA.held(count)
  local number = reached(correction, 8, settled, count.told)
  if number > 0 then count.told = number end
  return number, settled
end

function QUOTA.write(key, count, correction) QUOTA.keep(key, count, correction[5], correction[6]) end

if rolls then
  function ROLLING.open(key, text, correction) return ROLLING.read(key, text, correction[6], correction[5]) end

  function ROLLING.correct(count, correction, at)
    local list, difference, window = count.list, correction[2], correction[7]
    if window == 0 then window = floor(at / count.width) end
    local place = #list - 2
    while place >= count.first and list[place] ~= window do place = place - 3 end
    if place >= count.first then -- else it has fallen out, and what it gives back with it
      local units = min(list[place + 1], max(0, -difference))
      local held = flag(correction[4], HOLDS) and min(list[place + 2], correction[3]) or 0
      list[place + 1], list[place + 2] = list[place + 1] - units, list[place + 2] - held
      count.used, count.held = count.used - units, count.held - held
    end
    return ROLLING.owe(count, correction, max(0, difference))
  end

  function ROLLING.owe(count, correction, units)
    count.debt = count.debt + units
    ROLLING.absorb(count, count.running)
    local settled = count.used + count.debt - count.held
    local number = reached(correction, 8, settled, count.told)
    if number > 0 then count.told, count.told_in = number, count.running end
    return number, settled
  end
end

function SEATS.open() return {} end

function SEATS.correct(count, _, _, id)
  count[#count + 1] = id
  return 0
end

function SEATS.owe() return 0 end

function SEATS.write(key, count)
  if count[1] then redis.pcall('ZREM', key, unpack(count)) end
end

local counts, changed, ended, marked, sums, replies, index = {}, {}, {}, {}, {}, {}, 1
for number, request in ipairs(requests) do
  local first, id, row, field, counters, corrections, unreserved = index, unpack(request)
  local reservation, ledger, reserved = KEYS[first], KEYS[first + 1], found[first]
  index = first + 2 + #corrections
  local reply = {SETTLED}
  local over = reserved == GONE or ended[reservation] or marked[reservation]
  if over or not reserved and unreserved ~= 1 then
    reply[1] = ABSENT
    if not reserved then marked[reservation] = true end
  -- The row is written first, because it alone can fail: where its key holds something else.
  elseif row ~= '' and type(redis.pcall('XADD', ledger, '*', 'row', row)) == 'table' then
    reply[1] = UNWRITTEN
  else
    local at
    if reserved then
      ended[reservation], at = true, tonumber(string.match(reserved, '^%d+'))
      if unreserved == 1 then marked[reservation] = true end -- or it would be settled again without one
    else
      marked[reservation] = true
    end
    for place, correction in ipairs(corrections) do
      local key, kind = KEYS[first + 1 + place], KINDS[correction[1]]
      local count = counts[key]
      if count == nil then
        count = kind.open(key, found[first + 1 + place], correction)
        counts[key] = count
      end
      if count then
        local threshold, settled
        if reserved then
          if unreserved == 1 and kind == QUOTA then correction[7] = 0 end -- nobody was told in which it was taken
          threshold, settled = kind.correct(count, correction, at, id)
        else
          threshold, settled = kind.owe(count, correction, correction[2] + correction[3])
        end
        changed[key] = correction
        if threshold > 0 then
          local size = #reply
          reply[size + 1], reply[size + 2], reply[size + 3] = place, threshold, settled
        end
      end
    end
    sums[ledger] = sums[ledger] or {}
    local sum = sums[ledger][field] or {}
    sums[ledger][field] = sum
    for place, by in ipairs(counters) do sum[place] = (sum[place] or 0) + by end
  end
  replies[number] = reply
end

for key, correction in pairs(changed) do KINDS[correction[1]].write(key, counts[key], correction) end
for ledger, fields in pairs(sums) do
  local new = false
  for field, sum in pairs(fields) do
    for place, by in ipairs(sum) do
      local counter = field .. ':' .. COUNTERS[place]
      if by > 0 and redis.pcall('HINCRBY', ledger .. hour, counter, format('%.0f', by)) == by then new = true end
    end
  end
  if new then redis.call('EXPIRE', ledger .. hour, '34560000') end -- 400 days: thirteen months, and the longest of them
end
for reservation in pairs(ended) do redis.call('DEL', reservation) end
for reservation in pairs(marked) do redis.call('SET', reservation, GONE, 'PX', mark_ms) end
return replies
