-- Moves a group that has no living member. Returns 1, 0 if it does not exist, or minus the number of members.
-- KEYS: group, exceptions of the partition, stream. ARGV: partition, id.
local all = redis.call('HGETALL', KEYS[1])
if #all == 0 then return 0 end
local time = redis.call('TIME')
local now, n = time[1] * 1000 + math.floor(time[2] / 1000), 0
for i = 1, #all, 2 do
  if string.match(all[i], '^m:') and tonumber(string.match(all[i + 1], '^(%d+)|')) >= now then n = n + 1 end
end
if n > 0 then return -n end
local cursor = redis.call('HGET', KEYS[1], 'c:' .. ARGV[1])
if not cursor then return 0 end
local floor, epoch = string.match(cursor, '^([^|]*)|([^|]*)|')
local info, added = redis.call('XINFO', 'STREAM', KEYS[3]), 0
for i = 1, #info, 2 do if info[i] == 'entries-added' then added = tonumber(info[i + 1]) end end
local behind, from = 0, ARGV[2]
while true do
  local part = redis.call('XRANGE', KEYS[3], from, '+', 'COUNT', 512)
  behind = behind + #part
  if #part < 512 then break end
  from = '(' .. part[#part][1]
end
redis.call('DEL', KEYS[2])
redis.call('HSET', KEYS[1], 'c:' .. ARGV[1],
  ARGV[2] .. '|' .. string.format('%.0f', (tonumber(epoch) + 1) % 4294967296) .. '||' .. string.format('%.0f', added - behind))
return 1
