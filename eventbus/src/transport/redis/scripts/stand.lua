-- Says that a member lives and removes those that do not. Returns its number (a new one if it was removed), the
-- generation, the living members, and for each partition: number, floor, epoch, owner.
-- KEYS: group. ARGV: member, session in ms, process.
if redis.call('EXISTS', KEYS[1]) == 0 then return nil end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local member = ARGV[1]
local alive = string.format('%.0f', now + ARGV[2]) .. '|' .. ARGV[3]
if redis.call('HEXISTS', KEYS[1], 'm:' .. member) == 0 then
  member = string.format('%.0f', redis.call('HINCRBY', KEYS[1], 'seq', 1))
  redis.call('HINCRBY', KEYS[1], 'gen', 1)
end
redis.call('HSET', KEYS[1], 'm:' .. member, alive)
local all = redis.call('HGETALL', KEYS[1])
local members, cursors, lives = {}, {}, {}
for i = 1, #all, 2 do
  local id = string.match(all[i], '^m:(%d+)$')
  if id then
    if tonumber(string.match(all[i + 1], '^(%d+)|')) < now then
      redis.call('HDEL', KEYS[1], all[i])
      redis.call('HINCRBY', KEYS[1], 'gen', 1)
    else
      members[#members + 1], lives[id] = id, true
    end
  end
end
for i = 1, #all, 2 do
  local p = string.match(all[i], '^c:(%d+)$')
  if p then
    local floor, epoch, owner, passed = string.match(all[i + 1], '^([^|]*)|([^|]*)|([^|]*)|([^|]*)$')
    if owner ~= '' and not lives[owner] then
      owner = ''
      redis.call('HSET', KEYS[1], all[i], floor .. '|' .. epoch .. '||' .. passed)
    end
    cursors[#cursors + 1] = {p, floor, epoch, owner}
  end
end
return {member, redis.call('HGET', KEYS[1], 'gen'), members, cursors}
