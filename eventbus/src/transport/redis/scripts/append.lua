-- Appends events of one partition, in order; all or none, since memory is checked before a script begins.
-- KEYS: stream, meta. ARGV: channel, partition, partitions of the topic as the publisher knows it, number of events, then
-- for each the number of fields and values, and those.
if redis.call('HGET', KEYS[2], 'partitions') ~= ARGV[3] or redis.call('EXISTS', KEYS[1]) == 0 then
  return redis.error_reply('NOTOPIC there is no such topic')
end
local ids, at = {}, 5
for event = 1, tonumber(ARGV[4]) do
  local n = tonumber(ARGV[at])
  ids[event] = redis.call('XADD', KEYS[1], '*', unpack(ARGV, at + 1, at + n))
  at = at + n + 1
end
redis.call('PUBLISH', ARGV[1], ARGV[2])
return ids
