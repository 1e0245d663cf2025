#!lua
-- The counts of the four kinds of limit: what admit.lua and settle.lua both do to them. This text stands in front of
-- theirs.
--
-- A count is a map in MessagePack (one value is read faster than a text that is taken apart), of these numbers:
--   rate 'r':    at us, backlog us, unit (us per unit), held, earlier, since us, drained us, fill us
--   quota 'q':   window (its start) s, used, held, carried, before s, late, told
--   rolling 'w': width us, debt, told, told_in, and a list: of each bucket its number, what is used, what is held
--   seats 's':   none of it; a sorted set, id -> expiry us
-- Held is what requests under way have reserved; used includes it. Told is the highest threshold that has been told.

local LONGEST = 2 ^ 53 -- us, 285 years: what a double and an expiry can hold
local HOLDS, SHADOW = 1, 2 -- the flags of a limit

local format, floor, ceil, min, max = string.format, math.floor, math.ceil, math.min, math.max
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local found = redis.call('MGET', unpack(KEYS)) -- what is no string reads as absent

local function flag(flags, bit) return flags % (2 * bit) >= bit end

-- The count at a key; nil where there is none, false where there is something else.
local function read(key, text, kind)
  if text then
    local whole, count = pcall(cmsgpack.unpack, text)
    return whole and type(count) == 'table' and count.kind == kind and count
  end
  if redis.call('EXISTS', key) == 1 then return false end
end

local function write(key, count, ms)
  redis.call('SET', key, cmsgpack.pack(count), 'PX', format('%.0f', min(ms, LONGEST / 1000)))
end

-- The highest threshold, of those that stand in `words` from `first` on, that is reached and not told yet; or 0.
local function reached(words, first, settled, told)
  local number = told
  while words[first + number] and settled >= words[first + number] do number = number + 1 end
  return number > told and number or 0
end

local RATE, QUOTA, ROLLING, SEATS = {}, {}, {}, {}
local KINDS = {r = RATE, q = QUOTA, w = ROLLING, s = SEATS}

-- GCRA in its leaky-bucket form (ITU-T I.371, annex A): the backlog is the time that it takes to drain what was taken.
-- Kept as an instant and a duration, the fraction of a microsecond survives: 10^12 tokens a minute are counted as well
-- as one request an hour.
--
-- What has drained while it was held is not given back: another burst would fit beside it. What is settled drains
-- first; what drains of the rest is remembered until it is known whose it was. What is older than the bucket takes to
-- drain (`fill`) is held no longer, and is told apart by two generations: held since `since`, and earlier.
function RATE.read(key, text, unit)
  local count = read(key, text, 'r')
  if count == nil then
    return {kind = 'r', at = now, backlog = 0, unit = unit, held = 0, earlier = 0, since = now, drained = 0, fill = 0}
  elseif not count then
    return false
  end
  local passed, held = max(0, now - count.at), (count.held + count.earlier) * count.unit
  local left = max(0, count.backlog - passed)
  local settled = max(0, count.backlog + count.drained - held - passed)
  count.drained, count.backlog = max(0, min(held, settled + held - left)), left
  if count.unit ~= unit then -- another rate than before: what was taken is so many units, not so much time
    local times = unit / count.unit
    count.backlog, count.drained, count.unit = left * times, count.drained * times, unit
  end
  return count
end

function RATE.write(key, count)
  local lasts = count.backlog
  if count.held + count.earlier > 0 then
    lasts = max(lasts, count.fill)
  elseif lasts == 0 then -- it would read as none
    return redis.call('DEL', key)
  end
  count.at = now
  write(key, count, lasts / 1000 + 1000)
end

-- A calendar window. What was used beyond the capacity is carried into the next one: so much of what is used now came
-- out of the window that began at `before`, and `late` was still held in that one when it ended.
function QUOTA.read(key, text)
  local count = read(key, text, 'q')
  if count ~= nil then return count end
  return {kind = 'q', window = 0, used = 0, held = 0, carried = 0, before = 0, late = 0, told = 0}
end

function QUOTA.held(count) return count.held + min(count.late, count.carried) end

-- Begin the window that starts at `start`; `last` is the one before it, where that is known.
function QUOTA.begin(count, start, last, capacity, nominal)
  local windows = count.window == last and 1 or max(1, floor((start - count.window) / nominal + 0.5))
  local carried = max(0, count.used - capacity * windows)
  count.before, count.late = 0, 0
  if carried > 0 then count.before, count.late = count.window, count.held end
  count.window, count.used, count.held, count.carried, count.told = start, carried, 0, carried, 0
end

-- Kept for three windows, whatever the clocks of the gateways say, and for as many more as the debt lasts.
function QUOTA.keep(key, count, capacity, nominal)
  write(key, count, (3 + floor(count.used / capacity)) * nominal * 1000)
end

-- A stretch of time that rolls on, in 120 buckets by the server's clock. The running one counts and 120 before it, the
-- oldest in full, so that no stretch ever holds more than the capacity. Debt stands beside them, and goes into the
-- bucket in which there is room for it.
local COUNTING = 121

-- Few limits roll, and each function costs a script what a limit's decision does: they are made where one is asked for.
local rolls = string.find(ARGV[1], '\161w', 1, true)
if rolls then
  function ROLLING.read(key, text, stretch, capacity)
    local width = ceil(stretch / (COUNTING - 1))
    local running = floor(now / width)
    local count = read(key, text, 'w')
    if count == nil then count = {width = width, debt = 0, told = 0, told_in = 0, list = {}} end
    if not count then return false end
    count.first, count.capacity = 1, capacity
    if count.width == width then
      local list, used, held = count.list, 0, 0
      for i = 1, #list, 3 do used, held = used + list[i + 1], held + list[i + 2] end
      count.used, count.held = used, held
    else
      ROLLING.resize(count, width)
    end
    local list = count.list
    if #list > 0 then running = max(running, list[#list - 2]) end -- a bucket that has begun is never left
    count.running = running
    while count.first < #list and list[count.first] + COUNTING <= running do ROLLING.fall(count, running) end
    ROLLING.absorb(count, running)
    if count.told_in + COUNTING <= running then count.told = 0 end
    return count
  end

  -- Another stretch than before: what was used goes into the buckets in which its buckets ended.
  function ROLLING.resize(count, width)
    local list, times = count.list, count.width / width
    count.list, count.width, count.used, count.held = {}, width, 0, 0
    count.told_in = ceil((count.told_in + 1) * times) - 1
    for i = 1, #list, 3 do ROLLING.put(count, ceil((list[i] + 1) * times) - 1, list[i + 1], list[i + 2]) end
  end

  function ROLLING.put(count, bucket, units, held)
    local list = count.list
    local last = #list - 2
    if last < count.first or list[last] ~= bucket then
      last = #list + 1
      list[last], list[last + 1], list[last + 2] = bucket, 0, 0
    end
    list[last + 1], list[last + 2] = list[last + 1] + units, list[last + 2] + held
    count.used, count.held = count.used + units, count.held + held
  end

  function ROLLING.absorb(count, bucket)
    local units = min(count.debt, count.capacity - count.used)
    if units > 0 then
      count.debt = count.debt - units
      ROLLING.put(count, bucket, units, 0)
    end
  end

  -- The oldest bucket falls out and debt takes its place, unless that is later than `latest`. Returns in which bucket.
  function ROLLING.fall(count, latest)
    local list, first = count.list, count.first
    if count.debt > count.capacity and count.used == count.capacity then -- whole rounds of it, at once
      local rounds = min(ceil(count.debt / count.capacity) - 1, floor((latest - list[first]) / COUNTING))
      if rounds > 0 then
        count.debt, count.held = count.debt - rounds * count.capacity, 0
        for i = first, #list, 3 do list[i], list[i + 2] = list[i] + rounds * COUNTING, 0 end
      end
    end
    local bucket = list[first] + COUNTING
    if bucket <= latest then
      count.used, count.held, count.first = count.used - list[first + 1], count.held - list[first + 2], first + 3
      ROLLING.absorb(count, bucket)
    end
    return bucket
  end

  function ROLLING.write(key, count)
    local counting, debt, width = {}, count.debt, count.width
    for i = count.first, #count.list do counting[#counting + 1] = count.list[i] end
    write(key, {kind = 'w', width = width, debt = debt, told = count.told, told_in = count.told_in, list = counting},
      (1 + ceil(debt / count.capacity)) * COUNTING * width / 1000 + 1000)
  end
end
