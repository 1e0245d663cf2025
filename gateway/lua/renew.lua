#!lua
-- Renew seats: a live request keeps its seat for another lease. A seat that lapsed while its worker was paused is taken
-- again, over the limit if need be: the request is running, and what runs is counted.
--
-- KEYS, for each seat: the sorted set, the reservation of its request. ARGV: lease ms, then the id of each seat.
-- Returns, for each seat: 1 kept, 0 had lapsed and is taken again, -1 the request is settled and needs none.

local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local lease = tonumber(ARGV[1])
local replies = {}
for i = 1, #KEYS / 2 do
  local seats, reservation, id = KEYS[2 * i - 1], KEYS[2 * i], ARGV[i + 1]
  if redis.call('EXISTS', reservation) == 0 then
    replies[i] = -1
  else
    local expiry = redis.call('ZSCORE', seats, id)
    replies[i] = (expiry and tonumber(expiry) > now) and 1 or 0
    redis.call('ZADD', seats, string.format('%.0f', now + lease * 1000), id)
    redis.call('PEXPIRE', seats, lease + 1000)
  end
end
return replies
