#!lua
-- Forget a user, and keep what was used. One of two steps, by ARGV[1]:
--
-- 'rows': replace entries of the ledger, or of dead letters, by the same rows without their user. KEYS: the stream. ARGV,
--   for each entry: its id, the row as it shall be, when it was first written, ms. The new entry has that as `at`, and
--   what else the old one had; consumers to come see it.
-- 'sums': merge groups of hours, days or months into others. KEYS: the number of times that this was done, the sums.
--   ARGV, for each group: its field, the field that it is merged into. What was rolled up before is made anew: it may
--   have been read in between two steps.
--
-- What is not there any more is left as it is, so that a step may be sent twice. Returns how many there were.

local done = 0

if ARGV[1] == 'rows' then
  for i = 2, #ARGV, 3 do
    local id = ARGV[i]
    local entry = redis.call('XRANGE', KEYS[1], id, id)[1]
    if entry then
      local fields = {'row', ARGV[i + 1], 'at', ARGV[i + 2]}
      for place = 1, #entry[2], 2 do
        local name = entry[2][place]
        if name ~= 'row' and name ~= 'at' then
          fields[#fields + 1], fields[#fields + 2] = name, entry[2][place + 1]
        end
      end
      redis.call('XADD', KEYS[1], '*', unpack(fields)) -- first: it alone can fail
      redis.call('XDEL', KEYS[1], id)
      done = done + 1
    end
  end
else
  for number = 2, #KEYS do
    local key = KEYS[number]
    for i = 2, #ARGV, 2 do
      local counters = redis.call('HGET', key, ARGV[i])
      if counters then
        counters = cmsgpack.unpack(counters)
        local before = redis.call('HGET', key, ARGV[i + 1])
        for place, counter in ipairs(before and cmsgpack.unpack(before) or {}) do
          counters[place] = (counters[place] or 0) + counter
        end
        redis.call('HSET', key, ARGV[i + 1], cmsgpack.pack(counters))
        redis.call('HDEL', key, ARGV[i])
        done = done + 1
      end
    end
  end
  if done > 0 then redis.call('INCR', KEYS[1]) end
end
return done
