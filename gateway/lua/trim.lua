#!lua
-- Remove old rows of one ledger that every export has delivered: one small step, which looks and removes at once, so
-- that no group can begin in between.
--
-- KEYS: the stream. ARGV: how long rows are kept, ms; the most that one step removes; the exports that there should be.
-- Returns how many rows were removed, up to which id rows are old, and of each group that has not delivered all of
-- these: its name, and the first id that it still needs ('-': it has no group yet).

local stream, keep, most = KEYS[1], tonumber(ARGV[1]), ARGV[2]
local time = redis.call('TIME')
local old = string.format('%.0f-0', math.max(0, time[1] * 1000 + math.floor(time[2] / 1000) - keep))
local groups = redis.pcall('XINFO', 'GROUPS', stream)
if groups.err then return {0, old} end -- there is no such stream

-- An id as numbers, and whether one is before another. Parts above 2^53 are rounded, which no clock and no stream reach.
local function parts(id)
  local ms, place = string.match(id, '^(%d+)-(%d+)$')
  return tonumber(ms), tonumber(place)
end

local function before(one, other)
  local ms, place = parts(one)
  local other_ms, other_place = parts(other)
  return ms < other_ms or ms == other_ms and place < other_place
end

local function after(id)
  local ms, place = parts(id)
  return string.format('%.0f-%.0f', ms, place + 1)
end

local up_to, blocking, there = old, {}, {}
local function needed(name, id)
  if before(id, old) then
    blocking[#blocking + 1], blocking[#blocking + 2] = name, id
    if before(id, up_to) then up_to = id end
  end
end

for _, flat in ipairs(groups) do
  local group = {}
  for place = 1, #flat, 2 do group[flat[place]] = flat[place + 1] end
  there[group.name] = true
  local first = group.pending > 0 and redis.call('XPENDING', stream, group.name)[2]
  needed(group.name, first or after(group['last-delivered-id']))
end
for place = 3, #ARGV do
  if not there[ARGV[place]] then return {0, old, ARGV[place], '-'} end
end

-- Whole nodes of the stream first, which costs little; in the end, what is old in the node that is left.
local removed = redis.call('XTRIM', stream, 'MINID', '~', up_to, 'LIMIT', most)
if removed < most / 2 then removed = removed + redis.call('XTRIM', stream, 'MINID', '=', up_to) end
return {removed, old, unpack(blocking)}
