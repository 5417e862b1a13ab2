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
      if string.match(all[i], '^m:') and tonumber(string.match(all[i + 1], '^(%d+)|')) >= now then gone = false end
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
local surplus = 0
if limits[2] ~= '' then surplus = math.max(0, redis.call('XLEN', KEYS[3]) - tonumber(limits[2])) end
local oldest = limits[1] ~= '' and now - tonumber(limits[1]) or 0
local part = redis.call('XRANGE', KEYS[3], '-', '+', 'COUNT', tonumber(ARGV[4]) + 1)
local keep
for i, entry in ipairs(part) do
  local ms, seq = string.match(entry[1], '^(%d+)-(%d+)$')
  ms, seq = tonumber(ms), tonumber(seq)
  local settled = not floor_ms or ms < floor_ms or (ms == floor_ms and seq < floor_seq)
  if i > tonumber(ARGV[4]) or not settled or (i > surplus and ms >= oldest) then keep = entry[1] break end
end
if #part == 0 or keep == part[1][1] then return 0 end
if not keep then
  -- Everything that is there goes.
  local ms, seq = string.match(part[#part][1], '^(%d+)-(%d+)$')
  keep = ms .. '-' .. string.format('%.0f', tonumber(seq) + 1)
end
local n = redis.call('XTRIM', KEYS[3], 'MINID', '=', keep)
redis.call('HSET', KEYS[1], 'first:' .. ARGV[3], keep)
return n
