-- Load for wrk: bodies from a file, in turn; optionally at a fixed rate, whatever the answers take.
--
--     wrk -t N -c N -s _load.lua URL -- BODIES RATE
--
-- BODIES: a file of JSON bodies, one a line, for POST; "-" for GET. RATE: requests a second of all
-- threads together; 0 asks again as soon as the answer is there. With a rate, every thread has one
-- connection and slots of its own; what is late waits in its thread, and counts from its slot on.

local ffi = require("ffi")
ffi.cdef [[
typedef struct { long seconds; long nanoseconds; } reir_time;
int clock_gettime(int clock, reir_time *now);
]]
local now = ffi.new("reir_time")

local function clock_s()
   ffi.C.clock_gettime(1, now)
   return tonumber(now.seconds) + tonumber(now.nanoseconds) / 1e9
end

local threads = {}

function setup(thread)
   thread:set("number", #threads)
   table.insert(threads, thread)
end

function init(args)
   bodies, statuses, answered, first = {}, {}, {}, {}
   if args[1] ~= "-" then
      for line in io.lines(args[1]) do bodies[#bodies + 1] = line end
      wrk.method = "POST"
      wrk.headers["Content-Type"] = "application/json"
   end
   place = number * 7
   local rate = tonumber(args[2])
   if rate > 0 then
      local count = tonumber(args[3])
      interval_s = count / rate
      delay = function()
         slot_s = slot_s or clock_s() + interval_s * (number + 1) / count
         return math.max(0, math.floor((slot_s - clock_s()) * 1000 + 0.5))
      end
   end
end

function request()
   if slot_s then
      sent_s = slot_s
      slot_s = slot_s + interval_s
   else
      sent_s = clock_s()
   end
   if #bodies == 0 then return wrk.format() end
   place = place % #bodies + 1
   return wrk.format(nil, nil, nil, bodies[place])
end

function response(status, headers)
   local key = tostring(status)
   statuses[key] = (statuses[key] or 0) + 1
   if status >= 200 and status < 300 and interval_s then
      answered[#answered + 1] = (clock_s() - sent_s) * 1000
   end
   if status == 503 or status == 429 then
      local advice = headers["Retry-After"] or headers["retry-after"]
      if not advice then statuses["no-retry-after"] = (statuses["no-retry-after"] or 0) + 1 end
   end
end

function done(summary, latency)
   local counts, times = {}, {}
   for _, thread in ipairs(threads) do
      for key, count in pairs(thread:get("statuses")) do
         counts[key] = (counts[key] or 0) + count
      end
      for _, ms in ipairs(thread:get("answered")) do times[#times + 1] = ms end
   end
   table.sort(times)
   local function percentile(p)
      if #times == 0 then return latency:percentile(p) / 1000 end
      return times[math.max(1, math.ceil(#times * p / 100))]
   end
   local parts = {}
   for key, count in pairs(counts) do parts[#parts + 1] = string.format('"%s": %d', key, count) end
   local e = summary.errors
   io.write(string.format(
      'FIGURES {"seconds": %.3f, "requests": %d, "p50_ms": %.3f, "p95_ms": %.3f, "p99_ms": %.3f, ' ..
      '"max_ms": %.3f, "broken": %d, "timeouts": %d, "statuses": {%s}}\n',
      summary.duration / 1e6, summary.requests, percentile(50), percentile(95), percentile(99),
      #times == 0 and latency.max / 1000 or times[#times], e.connect + e.read + e.write, e.timeout, table.concat(parts, ", ")))
end
