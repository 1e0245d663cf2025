#!lua
-- Renew seats: a live request keeps its seat for another lease. A seat that lapsed while its worker was paused is taken
-- again, over the limit if need be: the request is running, and what runs is counted.
--
-- KEYS, for each seat: the sorted set, the reservation of its request. ARGV: lease ms, then the id of each seat.
-- Returns, for each seat: 1 kept, 0 had lapsed and is taken again, -1 the request is settled or given up and needs
-- none, or its key holds something that is no set of seats.

local GONE = '-' -- see settle.lua

local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local lease = tonumber(ARGV[1])
local expiry = string.format('%.0f', now + lease * 1000)
local replies = {}
for i = 1, #KEYS / 2 do
  local seats, reservation, id = KEYS[2 * i - 1], KEYS[2 * i], ARGV[i + 1]
  local reserved = redis.call('GET', reservation)
  local before = redis.pcall('ZSCORE', seats, id)
  if not reserved or reserved == GONE or type(before) == 'table' then
    replies[i] = -1
  else
    replies[i] = (before and tonumber(before) > now) and 1 or 0
    redis.call('ZADD', seats, expiry, id)
    redis.call('PEXPIRE', seats, string.format('%.0f', lease + 1000))
  end
end
return replies
