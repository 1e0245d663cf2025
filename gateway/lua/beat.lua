#!lua
-- Say that a worker lives, and learn how many do.
--
-- KEYS: the workers, a sorted set, id -> expiry us. ARGV: the worker's id, lease ms.
-- Returns how many workers live, and how many of them have a smaller id.

local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local workers, id, lease = KEYS[1], ARGV[1], tonumber(ARGV[2])
redis.call('ZREMRANGEBYSCORE', workers, '-inf', string.format('%.0f', now))
redis.call('ZADD', workers, string.format('%.0f', now + lease * 1000), id)
redis.call('PEXPIRE', workers, string.format('%.0f', lease + 1000))
local living, rank = redis.call('ZRANGE', workers, 0, -1), 0
for _, other in ipairs(living) do
  if other < id then rank = rank + 1 end
end
return {#living, rank}
