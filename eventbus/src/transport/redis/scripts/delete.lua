-- Deletes a topic with its events, groups and positions. Returns 0 if it does not exist.
-- KEYS: meta, groups, streams. ARGV: channel, prefix of groups' keys, prefix of exceptions' keys.
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
for _, name in ipairs(redis.call('SMEMBERS', KEYS[2])) do
  redis.call('DEL', ARGV[2] .. name)
  for p = 0, #KEYS - 3 do redis.call('DEL', ARGV[3] .. name .. ':' .. p) end
end
redis.call('DEL', unpack(KEYS))
redis.call('PUBLISH', ARGV[1], 'gone')
return 1
