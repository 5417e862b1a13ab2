-- Stores progress. Returns the partitions that are no longer the member's, of which nothing is changed.
-- KEYS: group, then the exceptions of each partition. ARGV: member, then for each: number, epoch, floor, events passed,
-- whether entries below may be stored, number of changes, and for each change the id and what to remember: 's',
-- or 'attempt|delay in ms'.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local lost, at = {}, 2
local function parts(id)
  local ms, seq = string.match(id, '(%d+)-(%d+)')
  return tonumber(ms), tonumber(seq)
end
for k = 2, #KEYS do
  local p, epoch, floor, n_passed, below, n = ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3], ARGV[at + 4], tonumber(ARGV[at + 5])
  local cursor = redis.call('HGET', KEYS[1], 'c:' .. p)
  local old, now_epoch, owner, passed = string.match(cursor or '', '^([^|]*)|([^|]*)|([^|]*)|([^|]*)$')
  if owner ~= ARGV[1] or now_epoch ~= epoch then
    lost[#lost + 1] = p
  else
    local old_ms, old_seq = parts(old)
    local ms, seq = parts(floor)
    if ms < old_ms or (ms == old_ms and seq < old_seq) then floor, ms, seq = old, old_ms, old_seq end
    redis.call('HSET', KEYS[1], 'c:' .. p, floor .. '|' .. epoch .. '|' .. owner .. '|' .. string.format('%.0f', passed + n_passed))
    if below == '1' then
      for _, id in ipairs(redis.call('HKEYS', KEYS[k])) do
        local id_ms, id_seq = parts(id)
        if id_ms < ms or (id_ms == ms and id_seq < seq) then redis.call('HDEL', KEYS[k], id) end
      end
    end
    for change = 0, n - 1 do
      local id, past = ARGV[at + 6 + change * 2], ARGV[at + 7 + change * 2]
      local attempt, delay = string.match(past, '^(%d+)|(%d+)$')
      if delay then past = attempt .. '|' .. string.format('%.0f', now + delay) end
      redis.call('HSET', KEYS[k], id, past)
    end
  end
  at = at + 6 + n * 2
end
return lost
