"""Whether a Ray answers at an address, asked without Ray: its own client waits for minutes, or ends the process.

In the supervisor, before it joins another's Ray, and in the coordinator, while it waits for one to come back.
"""

from __future__ import annotations

import socket

from echelon.config import split_address

HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))  # and empty SETTINGS
CONNECT_TIMEOUT_S = 5.0


def reach_ray(address: str) -> str:
    """The address of this host that reaches that Ray: ranks on its nodes will dial it. Raises OSError with the reason.

    A port that is open and speaks no gRPC is not Ray's; so it is greeted.
    """
    with socket.create_connection(split_address(address), timeout=CONNECT_TIMEOUT_S) as connection:
        connection.sendall(HTTP2_GREETING)
        if connection.recv(9)[3:4] != b"\x04":
            raise ConnectionError("what listens there is no Ray")
        return str(connection.getsockname()[0])
