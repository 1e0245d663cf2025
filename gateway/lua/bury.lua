#!lua
-- Bury one row that an export cannot deliver: what is left of it goes to the dead letters, then it is acknowledged.
--
-- The copy is written first: where its key holds something else the script ends there, and the row stays pending.
--
-- KEYS: the stream of rows, the dead letters. ARGV: the export, the row's entry, what is wrong with it.
-- Returns 1, or 0 where somebody has acknowledged the row meanwhile, or it is gone.

local stream, dead = KEYS[1], KEYS[2]
local export, entry, wrong = ARGV[1], ARGV[2], ARGV[3]

if not redis.call('XPENDING', stream, export, entry, entry, 1)[1] then return 0 end
local found = redis.call('XRANGE', stream, entry, entry)[1]
if found then redis.call('XADD', dead, '*', 'entry', entry, 'error', wrong, unpack(found[2])) end
redis.call('XACK', stream, export, entry)
return found and 1 or 0
