-- Enters a group, creating it where it is missing. Returns the member's number, or nothing if the topic is gone.
-- KEYS: meta, groups, group, streams. ARGV: group's name, ephemeral, session in ms, process, start: 'latest',
-- 'earliest' or 'ids', then an id for each stream.
if redis.call('EXISTS', KEYS[1]) == 0 then return nil end
local function parts(id)
  local ms, seq = string.match(id, '(%d+)-(%d+)')
  return tonumber(ms), tonumber(seq)
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if redis.call('EXISTS', KEYS[3]) == 0 then
  -- Members of a group that is created anew never have the numbers of members before.
  redis.call('HSET', KEYS[3], 'gen', 0, 'ephemeral', ARGV[2], 'seq', string.format('%.0f', now * 1000))
  for s = 4, #KEYS do
    local info = redis.call('XINFO', 'STREAM', KEYS[s])
    local of = {}
    for i = 1, #info, 2 do of[info[i]] = info[i + 1] end
    local added, length = tonumber(of['entries-added']), tonumber(of['length'])
    local last_ms, last_seq = parts(of['last-generated-id'])
    local floor, passed
    if ARGV[5] == 'latest' then
      floor, passed = string.format('%.0f-%.0f', last_ms, last_seq + 1), added
    elseif ARGV[5] == 'earliest' then
      floor, passed = redis.call('HGET', KEYS[1], 'first:' .. (s - 4)) or '0-0', added - length
    else
      -- Not beyond the end, whatever the client's clock says; not below what was removed.
      floor = ARGV[2 + s]
      local ms, seq = parts(floor)
      if ms > last_ms or (ms == last_ms and seq > last_seq) then floor = string.format('%.0f-%.0f', last_ms, last_seq + 1) end
      local first = redis.call('HGET', KEYS[1], 'first:' .. (s - 4))
      if first then
        local first_ms, first_seq = parts(first)
        if ms < first_ms or (ms == first_ms and seq < first_seq) then floor = first end
      end
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
-- As text: Lua writes large numbers its own way.
local member = string.format('%.0f', redis.call('HINCRBY', KEYS[3], 'seq', 1))
redis.call('HSET', KEYS[3], 'm:' .. member, string.format('%.0f', now + ARGV[3]) .. '|' .. ARGV[4])
redis.call('HINCRBY', KEYS[3], 'gen', 1)
return member
