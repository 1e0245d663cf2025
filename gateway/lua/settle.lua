-- Settle requests: append the row to the ledger, give back the seat, correct every limit by (used - reserved), add to the
-- sums of the hour, the day and the month. The reservation is the right to do so: whoever comes second changes nothing.
--
-- KEYS, for each request: its reservation, the live requests, the ledger stream, then each count that is corrected.
-- ARGV: the requests in MessagePack, mark ms, settled ms. A request is {id, row ('' for none), field of the sums, what
--   each of the sums' counters grows by, corrections, flags}, a correction is {kind, difference, amount that was taken,
--   flags, then}
--   rate 'r':    units per period, period us
--   quota 'q':   capacity, a window's nominal length s, window as admit.lua told it (0: nobody was told), thresholds
--   rolling 'w': capacity, stretch us, window as above, thresholds
--   seats 's':   nothing
--   Flags of a correction: 1 what was taken is held until now. Flags of a request: 1 it was served without the store:
--   its windows are what a gateway's clock says; 2 its worker has died, and the row is what is known of it; 4 it was
--   found here: if it is here no more, somebody else has settled it.
-- Returns, for each request: 1 settled, -1 its row cannot be written and nothing has changed, 0 it was settled or given
-- up before, 2 it was before, by a sweeper who took its worker for dead: then the row that he wrote. Where nothing is
-- known of a request with a row, what it used is counted now; of one without, its id is marked as given up, so that an
-- admission that is still on its way takes nothing. After a 1, for each threshold that is reached first by this: the
-- place of its correction, its number, and what is used without what is held.
--
-- What has ended leaves a mark in the place of its reservation, so that sending it twice counts once: '-' given up,
-- '+' settled, '~' and the row where its worker was taken for dead.
--
-- A row is in the sums of the instant in the id of its entry, which never goes back, whatever a clock does. The sums
-- stand in '<ledger stream>:hour:<n>', ':day:<n>' and ':month:<n>', numbers since 1970 in UTC: hashes, of each field
-- a MessagePack array of counters.

local SETTLED, ABSENT, UNWRITTEN, INTERRUPTED = 1, 0, -1, 2
local GONE, DONE, DEAD = '-', '+', '~'
local UNRESERVED, SWEPT = 1, 4 -- and 2, which says how it is marked
local KEPT = '34560000' -- s, 400 days: thirteen months, and the longest of them
local DEAD_MS = '86400000' -- in which a worker that was paused may come and say what it really was

local requests, mark_ms, settled_ms = cmsgpack.unpack(ARGV[1]), ARGV[2], ARGV[3]

-- Months since 1970 of a day since 1970, in the proleptic Gregorian calendar.
local function month(day)
  local shifted = day + 719468 -- since the first of March in the year 0
  local era = floor(shifted / 146097)
  local of_era = shifted - era * 146097
  local year = floor((of_era - floor(of_era / 1460) + floor(of_era / 36524) - floor(of_era / 146096)) / 365)
  local of_year = of_era - 365 * year - floor(year / 4) + floor(year / 100)
  return (year + era * 400 - 1970) * 12 + floor((5 * of_year + 2) / 153) + 2
end

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

function SEATS.owe(count, correction, _, id) return SEATS.correct(count, correction, nil, id) end

function SEATS.write(key, count)
  if count[1] then redis.pcall('ZREM', key, unpack(count)) end
end

local counts, changed, marks, ended, sums, replies, index = {}, {}, {}, {}, {}, {}, 1

local function correct(first, corrections, id, at, flags, reply)
  for place, correction in ipairs(corrections) do
    local key, kind = KEYS[first + place], KINDS[correction[1]]
    local count = counts[key]
    if count == nil then
      count = kind.open(key, found[first + place], correction)
      counts[key] = count
    end
    if count then
      local threshold, settled
      if at then
        if flag(flags, UNRESERVED) and kind == QUOTA then correction[7] = 0 end -- nobody was told where it was taken
        threshold, settled = kind.correct(count, correction, at, id)
      else
        threshold, settled = kind.owe(count, correction, correction[2] + correction[3], id)
      end
      changed[key] = correction
      if threshold > 0 then
        local size = #reply
        reply[size + 1], reply[size + 2], reply[size + 3] = place, threshold, settled
      end
    end
  end
end

local last_hour, last_ledger, last_sums

-- The keys of the sums of an hour since 1970; nearly all rows of a batch have the same.
local function sums_of(ledger, hour)
  if hour ~= last_hour or ledger ~= last_ledger then
    local day = floor(hour / 24)
    last_hour, last_ledger, last_sums = hour, ledger, {
      ledger .. format(':hour:%.0f', hour),
      ledger .. format(':day:%.0f', day),
      ledger .. format(':month:%.0f', month(day)),
    }
  end
  return last_sums
end

local function add(key, field, counters)
  local fields = sums[key] or {}
  local sum = fields[field] or {0, 0, 0, 0, 0, 0}
  for place, by in ipairs(counters) do sum[place] = sum[place] + by end
  sums[key], fields[field] = fields, sum
end

for number, request in ipairs(requests) do
  local first, id, row, field, counters, corrections, flags = index + 2, unpack(request)
  local reservation, live, ledger = KEYS[index], KEYS[index + 1], KEYS[first]
  local before = marks[reservation] or found[index]
  local mark = before and string.sub(before, 1, 1)
  local reply = {ABSENT}
  index = first + #corrections + 1
  if mark == DEAD and row ~= '' then
    reply[1], reply[2] = INTERRUPTED, string.sub(before, 2)
    for place, correction in ipairs(corrections) do -- it may have taken its seat again
      if correction[1] == 's' then redis.pcall('ZREM', KEYS[first + place], id) end
    end
  elseif mark == GONE or mark == DONE or mark == DEAD or not before and flag(flags, SWEPT) then
    ended[live] = ended[live] or {}
  elseif not before and row == '' then
    marks[reservation] = GONE
  else
    -- The row is written first, because it alone can fail: where its key holds something else.
    local entry = row == '' or redis.pcall('XADD', ledger, '*', 'row', row)
    if type(entry) == 'table' then
      reply[1] = UNWRITTEN
    else
      reply[1] = SETTLED
      local at = before and tonumber(string.match(before, '^%d+'))
      -- A count that another version wrote may be no count to this one: the row stands, and stands once.
      pcall(correct, first, corrections, id, at ~= 0 and at, flags, reply)
      if row == '' then
        marks[reservation] = GONE
      else
        for _, key in ipairs(sums_of(ledger, floor(tonumber(string.match(entry, '^%d+')) / 3600000))) do
          add(key, field, counters)
        end
        marks[reservation] = flags >= 2 and DEAD .. row or DONE
      end
    end
  end
  if reply[1] ~= UNWRITTEN then
    local over = ended[live] or {}
    over[#over + 1], ended[live] = id, over
  end
  replies[number] = reply
end

for key, correction in pairs(changed) do KINDS[correction[1]].write(key, counts[key], correction) end
for key, fields in pairs(sums) do
  local new = false
  for field, sum in pairs(fields) do
    local text = redis.pcall('HGET', key, field)
    local whole, count = pcall(cmsgpack.unpack, type(text) == 'string' and text or '')
    if whole and type(count) == 'table' then
      for place = 1, #sum do sum[place] = sum[place] + (count[place] or 0) end
    end
    if redis.pcall('HSET', key, field, cmsgpack.pack(sum)) == 1 then new = true end
  end
  if new then redis.call('EXPIRE', key, KEPT) end
end
for live, ids in pairs(ended) do
  if ids[1] then redis.pcall('ZREM', live, unpack(ids)) end
end
for reservation, mark in pairs(marks) do
  local lasts = mark == DONE and settled_ms or mark == GONE and mark_ms or DEAD_MS
  redis.call('SET', reservation, mark, 'PX', lasts)
end
return replies
