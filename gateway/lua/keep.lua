#!lua
-- Keep the record of a caller's key, and tell it to all who follow.
--
-- KEYS: the records, the changes. ARGV: the id of the key, its record, how many changes are kept. Returns 1.

redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[3], '*', 'record', ARGV[2])
return 1
