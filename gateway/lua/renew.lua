#!lua
-- Renew live requests: their leases and their seats, and what each has used so far. A seat that lapsed while its worker
-- was paused is taken again, over the limit if need be: the request is running, and what runs is counted.
--
-- KEYS, for each request: its reservation, the live requests of its organisation, then the sets of its seats.
-- ARGV: the requests in MessagePack, lease ms, reservation ms. A request is {id, progress, how many seats, intent}; with
--   an intent, what the store has lost of it is written again, as of a request of which no limit was taken.
-- Returns, for each request: how many of its seats had lapsed, -1 it is settled or given up, or a sweeper took its worker
-- for dead, -2 it is not known.

local DEAD = '~' -- see settle.lua

local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local requests, lease, reservation_ms = cmsgpack.unpack(ARGV[1]), tonumber(ARGV[2]), ARGV[3]
local expiry, lasts = string.format('%.0f', now + lease * 1000), string.format('%.0f', lease + 1000)
local replies, index = {}, 1
for number, request in ipairs(requests) do
  local id, progress, seats, intent = unpack(request)
  local reservation, live = KEYS[index], KEYS[index + 1]
  local stored = redis.pcall('GET', reservation)
  local value = stored
  if not value and intent ~= '' then value = '0 ' .. intent .. '\n' end
  local known = type(value) == 'string' and string.match(value, '^%d+ [^\n]*\n')
  if known then
    if stored ~= known .. progress then redis.call('SET', reservation, known .. progress, 'PX', reservation_ms) end
    redis.pcall('ZADD', live, expiry, id)
    replies[number] = 0
  else
    replies[number] = value and -1 or -2
  end
  for place = index + 2, index + 1 + seats do
    local before = redis.pcall('ZSCORE', KEYS[place], id)
    if (known or value and string.sub(value, 1, 1) == DEAD) and type(before) ~= 'table' then
      if known and not (before and tonumber(before) > now) then replies[number] = replies[number] + 1 end
      redis.call('ZADD', KEYS[place], expiry, id)
      redis.call('PEXPIRE', KEYS[place], lasts)
    end
  end
  index = index + 2 + seats
end
return replies
