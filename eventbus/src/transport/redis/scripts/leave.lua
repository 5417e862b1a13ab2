-- Leaves a group; an ephemeral one goes with its member.
-- KEYS: groups, group, then the exceptions of each partition. ARGV: channel, group's name, member.
if redis.call('HGET', KEYS[2], 'ephemeral') == '1' then
  redis.call('SREM', KEYS[1], ARGV[2])
  redis.call('DEL', unpack(KEYS, 2))
  return
end
if redis.call('HDEL', KEYS[2], 'm:' .. ARGV[3]) == 0 then return end
for p = 0, #KEYS - 3 do
  local cursor = redis.call('HGET', KEYS[2], 'c:' .. p)
  local floor, epoch, owner, passed = string.match(cursor or '', '^([^|]*)|([^|]*)|([^|]*)|([^|]*)$')
  if owner == ARGV[3] then redis.call('HSET', KEYS[2], 'c:' .. p, floor .. '|' .. epoch .. '||' .. passed) end
end
redis.call('HINCRBY', KEYS[2], 'gen', 1)
redis.call('PUBLISH', ARGV[1], 'group')
