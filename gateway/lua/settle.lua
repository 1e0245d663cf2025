#!lua
-- Settle requests: append the row to the ledger, give back the seat, correct every limit by (used - reserved), add the
-- hourly sums. The reservation is the right to do so, and is deleted with it: who comes second changes nothing.
--
-- KEYS, for each request: its reservation, the ledger stream, then each count that is corrected.
-- ARGV: the requests in MessagePack, mark ms. A request is {id, row ('' for none), field of the sums, what each of
--   COUNTERS grows by, corrections}, a correction is
--   rate:  {'r', difference, units per period, period us}
--   quota: {'q', difference, window start s; 0: its gateway was never told}
--   seats: {'s'}
-- The sums stand in '<ledger stream>:<hour>', hours since 1970 in UTC, on the ledger's own slot.
-- Returns, for each request: 1 settled, -1 its row cannot be written and nothing has changed, 0 nothing was reserved
-- under this id (any more). Then the id is marked as given up, so that an admission that is still on its way takes
-- nothing.

local SETTLED, ABSENT, UNWRITTEN = 1, 0, -1
local COUNTERS = {'requests', 'input_tokens', 'cached_tokens', 'output_tokens', 'cost_microusd'}
local GONE = '-'
local LONGEST = 2 ^ 53 -- us, 285 years: what a double and an expiry can hold

local format, min, max = string.format, math.min, math.max
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local hour = format(':%.0f', math.floor(time[1] / 3600))
local requests, mark_ms = cmsgpack.unpack(ARGV[1]), ARGV[2]
local held = redis.call('MGET', unpack(KEYS)) -- what is no string reads as absent

-- The three kinds of limit, see admit.lua: how a count is read (nil or false: there is none to correct), corrected and
-- written.
local RATE, QUOTA, SEATS = {}, {}, {}
local KINDS = {r = RATE, q = QUOTA, s = SEATS}

function RATE.read(key, text, correction)
  if not text then
    return redis.call('EXISTS', key) == 0 and {backlog = 0, unit = correction[4] / correction[3], units = 0}
  end
  local at, backlog, unit = string.match(text, '^(%d+) ([%d.e+-]+) ([%d.e+-]+)$')
  backlog, unit = tonumber(backlog), tonumber(unit)
  return backlog and unit and {backlog = max(0, backlog - max(0, now - at)), unit = unit, units = 0}
end

function RATE.correct(count, correction) count.units = count.units + correction[2] end

function RATE.write(key, count)
  -- What has drained is not given back: a bucket is never more than full. What is owed is carried.
  local backlog = max(0, count.backlog + count.units * count.unit)
  if backlog == 0 then return redis.call('DEL', key) end
  redis.call('SET', key, format('%.0f %.17g %.17g', now, backlog, count.unit),
    'PX', format('%.0f', min(backlog, LONGEST) / 1000 + 1000))
end

function QUOTA.read(_, text)
  local window, used = string.match(text or '', '^(%d+) (%d+)$')
  return window and {window = tonumber(window), used = tonumber(used)}
end

function QUOTA.correct(count, correction, _, reserved)
  -- A reservation of a window that has ended must not change a later one.
  local window = correction[3]
  if window == count.window or window == 0 and tonumber(string.match(reserved, '^%d+')) >= count.window * 1000000 then
    count.used = count.used + correction[2]
  end
end

function QUOTA.write(key, count)
  redis.call('SET', key, format('%.0f %.0f', count.window, max(0, count.used)), 'KEEPTTL')
end

function SEATS.read() return {} end

function SEATS.correct(count, _, id) count[#count + 1] = id end

function SEATS.write(key, count) redis.pcall('ZREM', key, unpack(count)) end

local counts, changed, ended, marked, sums, replies, index = {}, {}, {}, {}, {}, {}, 1
for number, request in ipairs(requests) do
  local first, id, row, field, counters, corrections = index, unpack(request)
  local reservation, ledger, reserved = KEYS[first], KEYS[first + 1], held[first]
  index = first + 2 + #corrections
  local reply = SETTLED
  if not reserved or reserved == GONE or ended[reservation] then
    reply = ABSENT
    if not reserved then marked[reservation] = true end
  -- The row is written first, because it alone can fail: where its key holds something else.
  elseif row ~= '' and type(redis.pcall('XADD', ledger, '*', 'row', row)) == 'table' then
    reply = UNWRITTEN
  else
    ended[reservation] = true
    for place, correction in ipairs(corrections) do
      local key, kind = KEYS[first + 1 + place], KINDS[correction[1]]
      local count = counts[key]
      if count == nil then
        count = kind.read(key, held[first + 1 + place], correction) or false
        counts[key] = count
      end
      if count then
        kind.correct(count, correction, id, reserved)
        changed[key] = kind
      end
    end
    sums[ledger] = sums[ledger] or {}
    local sum = sums[ledger][field] or {}
    sums[ledger][field] = sum
    for place, by in ipairs(counters) do sum[place] = (sum[place] or 0) + by end
  end
  replies[number] = reply
end

for key, kind in pairs(changed) do kind.write(key, counts[key]) end
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
