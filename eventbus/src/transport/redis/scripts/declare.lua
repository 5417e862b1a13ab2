-- Creates a topic if it is missing; returns its number of partitions and whether it is new.
-- KEYS: meta, then a stream for each partition. ARGV: partitions, max age in ms or '', most events or ''.
local known = redis.call('HGET', KEYS[1], 'partitions')
if known then return {tonumber(known), 0} end
for p = 2, #KEYS do
  redis.call('XGROUP', 'CREATE', KEYS[p], 'eventbus', '$', 'MKSTREAM')
  redis.call('XGROUP', 'DESTROY', KEYS[p], 'eventbus')
end
redis.call('HSET', KEYS[1], 'partitions', ARGV[1], 'max_age', ARGV[2], 'max_events', ARGV[3])
return {tonumber(ARGV[1]), 1}
