#!lua
-- Settle requests: give back the seat, correct every limit by (used - reserved), add the hourly sums, append the row to
-- the ledger. The reservation is the right to do so, and is deleted with it: who comes second changes nothing.
--
-- KEYS, for each request: its reservation, the ledger stream, then each count that is corrected.
-- ARGV: number of requests, mark ms; then for each request: id, row ('' for none), field of the sums, number of
--   counters, counters (name, increment), number of corrections; then for each correction:
--   rate:  'r', difference, units per period, period us
--   quota: 'q', difference, window start s
--   seats: 's'
-- The sums stand in '<ledger stream>:<hour>', hours since 1970 in UTC, on the ledger's own slot.
-- Returns, for each request: 1 settled, 0 nothing was reserved under this id (any more). Then the id is marked as given
-- up, so that an admission that is still on its way takes nothing.

local GONE = '-'

local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local hour = math.floor(time[1] / 3600)
local mark_ms = ARGV[2]

local held = redis.call('MGET', unpack(KEYS))
local at_key = {}
for i, key in ipairs(KEYS) do at_key[key] = held[i] end

local read = 2
local function argument() read = read + 1 return ARGV[read] end
local function number() return tonumber(argument()) end

local replies, key_index = {}, 0
local ended, marked, rows, sums, backlogs, used, left = {}, {}, {}, {}, {}, {}, {}
for request = 1, tonumber(ARGV[1]) do
  local reservation, ledger = KEYS[key_index + 1], KEYS[key_index + 2]
  key_index = key_index + 2
  local id, row, field = argument(), argument(), argument()
  local held_one = at_key[reservation]
  local settled = held_one and held_one ~= GONE and not ended[reservation]
  if settled then
    ended[reservation] = true
    if row ~= '' then rows[#rows + 1] = {ledger, row} end
  elseif not held_one then
    marked[reservation] = true
  end
  for _ = 1, number() do
    local counter, by = field .. ':' .. argument(), number()
    if settled and row ~= '' then
      local sum = ledger .. ':' .. string.format('%.0f', hour)
      sums[sum] = sums[sum] or {}
      sums[sum][counter] = (sums[sum][counter] or 0) + by
    end
  end
  for _ = 1, number() do
    key_index = key_index + 1
    local key, kind = KEYS[key_index], argument()
    if kind == 'r' then
      local difference, units, period = number(), number(), number()
      if settled then backlogs[key] = (backlogs[key] or 0) + difference * period / units end
    elseif kind == 'q' then
      local difference, window = number(), number()
      if settled then
        used[key] = used[key] or {}
        used[key][window] = (used[key][window] or 0) + difference
      end
    elseif settled then
      left[key] = left[key] or {}
      table.insert(left[key], id)
    end
  end
  replies[request] = settled and 1 or 0
end

local writes = {}
for key, difference in pairs(backlogs) do
  local at, backlog = string.match(at_key[key] or '0 0', '^(%d+) ([%d.e+-]+)$')
  if tonumber(backlog) then
    -- What has drained is not given back: a bucket is never more than full. What is owed is carried.
    backlog = math.max(0, math.max(0, backlog - math.max(0, now - at)) + difference)
    writes[key] = {string.format('%.0f %.17g', now, backlog), math.ceil(backlog / 1000) + 1000}
  end
end
for key, differences in pairs(used) do
  local window, amount = string.match(at_key[key] or '', '^(%d+) (-?%d+)$')
  -- A reservation of a window that has ended must not change a later one.
  -- 0: of an admission that was never answered, a moment ago.
  local difference = tonumber(window) and (differences[tonumber(window)] or differences[0])
  if tonumber(amount) and difference then
    writes[key] = {string.format('%s %.0f', window, math.max(0, amount + difference)), 'keep'}
  end
end

for key, write in pairs(writes) do
  if write[2] == 'keep' then redis.call('SET', key, write[1], 'KEEPTTL')
  else redis.call('SET', key, write[1], 'PX', string.format('%.0f', write[2])) end
end
for key, ids in pairs(left) do redis.call('ZREM', key, unpack(ids)) end
for _, row in ipairs(rows) do redis.call('XADD', row[1], '*', 'row', row[2]) end
for sum, counters in pairs(sums) do
  for counter, by in pairs(counters) do redis.call('HINCRBY', sum, counter, string.format('%.0f', by)) end
  redis.call('EXPIRE', sum, 34560000) -- 400 days: thirteen months, and the longest of them
end
for reservation in pairs(ended) do redis.call('DEL', reservation) end
for reservation in pairs(marked) do redis.call('SET', reservation, GONE, 'PX', mark_ms) end
return replies
