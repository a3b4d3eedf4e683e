-- Holds a request for a second without occupying a thread; see `haproxy_settings.py`.
core.register_action("hold", { "http-req" }, function() core.msleep(1000) end)
