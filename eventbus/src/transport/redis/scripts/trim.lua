-- Removes what retention allows of one partition: old or surplus events that every group has settled; forgets
-- broadcasts whose process died. Returns how many were removed.
-- KEYS: meta, groups, stream. ARGV: prefix of groups' keys, prefix of exceptions' keys, partition, most at once.
local limits = redis.call('HMGET', KEYS[1], 'max_age', 'max_events', 'partitions')
if not limits[3] then return 0 end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local floor_ms, floor_seq
for _, name in ipairs(redis.call('SMEMBERS', KEYS[2])) do
  local group = ARGV[1] .. name
  local gone = false
  if redis.call('HGET', group, 'ephemeral') == '1' then
    gone = true
    local all = redis.call('HGETALL', group)
    for i = 1, #all, 2 do
      -- Long after its session: a server that was away must not end a broadcast that lives.
      if string.match(all[i], '^m:') and tonumber(string.match(all[i + 1], '^(%d+)|')) + 60000 >= now then gone = false end
    end
    if gone then
      redis.call('SREM', KEYS[2], name)
      redis.call('DEL', group)
      for p = 0, limits[3] - 1 do redis.call('DEL', ARGV[2] .. name .. ':' .. p) end
    end
  end
  local cursor = not gone and redis.call('HGET', group, 'c:' .. ARGV[3])
  if cursor then
    local ms, seq = string.match(cursor, '^(%d+)-(%d+)|')
    ms, seq = tonumber(ms), tonumber(seq)
    if not floor_ms or ms < floor_ms or (ms == floor_ms and seq < floor_seq) then floor_ms, floor_seq = ms, seq end
  end
end
if limits[1] == '' and limits[2] == '' then return 0 end
local surplus = 0
if limits[2] ~= '' then surplus = math.max(0, redis.call('XLEN', KEYS[3]) - tonumber(limits[2])) end
local oldest = limits[1] ~= '' and now - tonumber(limits[1]) or 0
-- In small parts: an entry comes with its body.
local n, last, from = 0, nil, '-'
while n < tonumber(ARGV[4]) do
  local part = redis.call('XRANGE', KEYS[3], from, '+', 'COUNT', n == 0 and 1 or 16)
  local stays = #part == 0
  for _, entry in ipairs(part) do
    local ms, seq = string.match(entry[1], '^(%d+)-(%d+)$')
    ms, seq = tonumber(ms), tonumber(seq)
    local settled = not floor_ms or ms < floor_ms or (ms == floor_ms and seq < floor_seq)
    if not settled or (n >= surplus and ms >= oldest) then stays = true break end
    n, last, from = n + 1, {ms, seq}, '(' .. entry[1]
  end
  if stays then break end
end
if not last then return 0 end
local first = string.format('%.0f-%.0f', last[1], last[2] + 1)
redis.call('HSET', KEYS[1], 'first:' .. ARGV[3], first)
return redis.call('XTRIM', KEYS[3], 'MINID', '=', first)
