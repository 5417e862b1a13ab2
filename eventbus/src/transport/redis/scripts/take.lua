-- Makes partitions a member's own, each if nobody changed it meanwhile, and loads what is remembered above its floor.
-- Returns for each taken one: number, then pairs of id and memory, with the time left of delays in ms.
-- KEYS: group, then the exceptions of each partition. ARGV: member, then for each: number, expected epoch,
-- whether the epoch grows.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local taken = {}
for k = 2, #KEYS do
  local p, expected, grows = ARGV[k * 3 - 4], ARGV[k * 3 - 3], ARGV[k * 3 - 2]
  local cursor = redis.call('HGET', KEYS[1], 'c:' .. p)
  if cursor then
    local floor, epoch, owner, passed = string.match(cursor, '^([^|]*)|([^|]*)|([^|]*)|([^|]*)$')
    if epoch == expected and (owner == '' or owner == ARGV[1]) then
      if grows == '1' then epoch = string.format('%.0f', (tonumber(epoch) + 1) % 4294967296) end
      redis.call('HSET', KEYS[1], 'c:' .. p, floor .. '|' .. epoch .. '|' .. ARGV[1] .. '|' .. passed)
      local one = {p}
      local past = redis.call('HGETALL', KEYS[k])
      for i = 1, #past, 2 do
        one[#one + 1] = past[i]
        local attempt, due = string.match(past[i + 1], '^(%d+)|(%d*)$')
        if not attempt then
          one[#one + 1] = 's'
        elseif due == '' then
          one[#one + 1] = attempt .. '|'
        else
          one[#one + 1] = attempt .. '|' .. string.format('%.0f', math.max(0, tonumber(due) - now))
        end
      end
      taken[#taken + 1] = one
    end
  end
end
return taken
