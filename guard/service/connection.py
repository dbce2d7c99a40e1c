"""Options of channels and servers: how either end finds out that the other is gone, and which way to it is taken.

Over TCP a host that vanishes closes nothing: the kernel gives up after some fifteen minutes, and a tap would be cut off
from the sidecar that has taken its place for as long.
"""

_PINGS = (  # while a call is open, whether anything is said in it or not
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
)
ANNOUNCED = "guard-announced"  # in a followed call's initial metadata, which grpc gives where a call failed, too
# grpc would send even loopback through the proxy of http_proxy or https_proxy, unless no_proxy lists it.
OF_CHANNEL = (*_PINGS, ("grpc.enable_http_proxy", 0))
# A server takes pings that come more often than every five minutes for an attack, unless it is told.
OF_SERVER = (*_PINGS, ("grpc.http2.min_ping_interval_without_data_ms", 10_000))
