-- Removes the events of a partition below an id, and notes up to where, so that readers learn of the hole. Returns how
-- many.
-- KEYS: meta, stream. ARGV: channel, partition, id.
local last = redis.call('XREVRANGE', KEYS[2], '(' .. ARGV[3], '-', 'COUNT', 1)
local n = redis.call('XTRIM', KEYS[2], 'MINID', '=', ARGV[3])
if n > 0 then
  local ms, seq = string.match(last[1][1], '^(%d+)-(%d+)$')
  redis.call('HSET', KEYS[1], 'first:' .. ARGV[2], ms .. '-' .. string.format('%.0f', tonumber(seq) + 1))
end
redis.call('PUBLISH', ARGV[1], ARGV[2])
return n
