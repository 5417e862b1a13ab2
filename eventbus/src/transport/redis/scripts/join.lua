-- Enters a group, creating it where it is missing. Returns the member's number, or nothing if the topic is gone.
-- KEYS: meta, groups, group, streams. ARGV: group's name, ephemeral, session in ms, process, start: 'latest',
-- 'earliest' or 'ids', then an id for each stream.
if redis.call('EXISTS', KEYS[1]) == 0 then return nil end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if redis.call('EXISTS', KEYS[3]) == 0 then
  redis.call('HSET', KEYS[3], 'gen', 0, 'ephemeral', ARGV[2])
  for s = 4, #KEYS do
    local info = redis.call('XINFO', 'STREAM', KEYS[s])
    local of = {}
    for i = 1, #info, 2 do of[info[i]] = info[i + 1] end
    local added, length = tonumber(of['entries-added']), tonumber(of['length'])
    local floor, passed
    if ARGV[5] == 'latest' then
      local ms, seq = string.match(of['last-generated-id'], '(%d+)-(%d+)')
      floor, passed = ms .. '-' .. string.format('%.0f', tonumber(seq) + 1), added
    elseif ARGV[5] == 'earliest' then
      floor, passed = '0-0', added - length
    else
      floor = ARGV[2 + s]
      -- Counted from the nearer side would be better; a group begins once.
      local n, from = 0, floor
      while true do
        local part = redis.call('XRANGE', KEYS[s], from, '+', 'COUNT', 512)
        n = n + #part
        if #part < 512 then break end
        from = '(' .. part[#part][1]
      end
      passed = added - n
    end
    redis.call('HSET', KEYS[3], 'c:' .. (s - 4), floor .. '|0||' .. passed)
  end
  redis.call('SADD', KEYS[2], ARGV[1])
end
local member = redis.call('HINCRBY', KEYS[3], 'seq', 1)
redis.call('HSET', KEYS[3], 'm:' .. member, string.format('%.0f', now + ARGV[3]) .. '|' .. ARGV[4])
redis.call('HINCRBY', KEYS[3], 'gen', 1)
return member
