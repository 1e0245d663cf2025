#!lua
-- Find requests whose worker has not renewed them in time: it has died, or was paused.
--
-- KEYS: the live requests of an organisation, the beginning of its reservations' keys (which are on the same slot).
-- ARGV: how many at most.
-- Returns, for each: its id, and its reservation. What has no reservation any more is forgotten here.

local time = redis.call('TIME')
local now = string.format('%.0f', time[1] * 1000000 + time[2])
local found = {}
for _, id in ipairs(redis.call('ZRANGE', KEYS[1], '-inf', now, 'BYSCORE', 'LIMIT', 0, ARGV[1])) do
  local value = redis.pcall('GET', KEYS[2] .. id)
  if type(value) == 'string' and string.match(value, '^%d+ ') then
    found[#found + 1], found[#found + 2] = id, value
  else
    redis.call('ZREM', KEYS[1], id)
  end
end
return found
