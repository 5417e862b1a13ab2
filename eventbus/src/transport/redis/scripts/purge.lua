-- Removes the events of a partition below an id, and notes it, so that readers learn of the hole. Returns how many.
-- KEYS: meta, stream. ARGV: channel, partition, id.
local n = redis.call('XTRIM', KEYS[2], 'MINID', '=', ARGV[3])
if n > 0 then redis.call('HSET', KEYS[1], 'first:' .. ARGV[2], ARGV[3]) end
redis.call('PUBLISH', ARGV[1], ARGV[2])
return n
