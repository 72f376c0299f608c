"""gRPC channel options of both sides: keepalive, message size, reconnection.

Used by every channel and server of Echelon; pure data. Both sides must agree, or a server answers a long silent
decode's pings with GOAWAY too_many_pings.
"""

from __future__ import annotations

MAX_MESSAGE_BYTES = 64 * 2**20

Options = tuple[tuple[str, int], ...]

_BOTH: Options = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A black-holed peer is noticed after 15 s, whether or not it owes us anything.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)

CLIENT_OPTIONS: Options = (
    *_BOTH,
    # gRPC's own back-off grows to two minutes: a restarted coordinator would be found that late.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.min_reconnect_backoff_ms", 3_000),  # despite its name, the time one connection attempt may take
)

SERVER_OPTIONS: Options = (
    *_BOTH,
    ("grpc.so_reuseport", 0),  # a second server on the port must fail, not share it
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
)
