-- Forgets a group that has no living member. Returns 1, 0 if it does not exist, or minus the number of members.
-- KEYS: groups, group, then the exceptions of each partition. ARGV: group's name.
local all = redis.call('HGETALL', KEYS[2])
if #all == 0 then return 0 end
local time = redis.call('TIME')
local now, n = time[1] * 1000 + math.floor(time[2] / 1000), 0
for i = 1, #all, 2 do
  if string.match(all[i], '^m:') and tonumber(string.match(all[i + 1], '^(%d+)|')) >= now then n = n + 1 end
end
if n > 0 then return -n end
redis.call('SREM', KEYS[1], ARGV[1])
redis.call('DEL', unpack(KEYS, 2))
return 1
