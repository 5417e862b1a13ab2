-- Hands partitions back. KEYS: group. ARGV: channel, member, partitions.
for i = 3, #ARGV do
  local cursor = redis.call('HGET', KEYS[1], 'c:' .. ARGV[i])
  local floor, epoch, owner, passed = string.match(cursor or '', '^([^|]*)|([^|]*)|([^|]*)|([^|]*)$')
  if owner == ARGV[2] then redis.call('HSET', KEYS[1], 'c:' .. ARGV[i], floor .. '|' .. epoch .. '||' .. passed) end
end
if redis.call('EXISTS', KEYS[1]) == 1 then redis.call('HINCRBY', KEYS[1], 'gen', 1) end
redis.call('PUBLISH', ARGV[1], 'group')
