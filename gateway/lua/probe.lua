#!lua
-- Whether the store does its work: a write, made like every other one, that a full store, a replica or one that cannot
-- write its disk refuses. A PING is answered by all of them.
--
-- KEYS: what is written. ARGV: how long it is kept, ms. Returns 1.

redis.call('SET', KEYS[1], '', 'PX', ARGV[1])
return 1
