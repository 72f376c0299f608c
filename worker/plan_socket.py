"""Plans on sockets: the leader sends each encoded StepPlan to every other rank of its replica, in order.

TCP on the interface it is given. Frames are (u32 little-endian length, payload), and nothing is pickled. A connection
opens with a hello that names rank, replica and epoch; another epoch is refused. It must not know what a payload
means. Every failure is an OSError.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Callable, Iterator

from echelon.internal.link import Fence

MAX_FRAME_BYTES = 64 << 20

_LENGTH = struct.Struct("<I")
_HELLO = struct.Struct("<4sIIQ")  # magic with the version, rank, replica, epoch
_MAGIC = b"EPL1"
_ACCEPTED = b""


class PlanServer:
    """The leader's end: listens at a free port of host. ranks: the ranks that will connect, each once."""

    def __init__(self, fence: Fence, ranks: frozenset[int], host: str) -> None:
        self._fence = fence
        self._expected = ranks
        self._connections: dict[int, socket.socket] = {}
        self._listener = socket.create_server((host, 0))
        self.address = "{}:{}".format(*self._listener.getsockname()[:2])

    def accept(self, timeout_s: float) -> None:
        """Waits until every expected rank has connected with this fence. Others are told why and turned away."""
        deadline_s = time.monotonic() + timeout_s
        while missing := self._expected - self._connections.keys():
            remaining_s = deadline_s - time.monotonic()
            if remaining_s <= 0:
                raise TimeoutError(f"ranks {sorted(missing)} did not connect to {self.address} within {timeout_s} s")
            self._listener.settimeout(remaining_s)
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                continue
            connection.settimeout(max(deadline_s - time.monotonic(), 0.001))
            try:
                self._admit(connection)
            except OSError:
                connection.close()  # it went away or sent garbage: that rank may still come

    def send(self, payload_of: Callable[[int], bytes], timeout_s: float | None = None) -> None:
        """One frame to every rank. A rank that reads nothing for timeout_s raises TimeoutError."""
        for rank, connection in self._connections.items():
            connection.settimeout(timeout_s)
            _send(connection, payload_of(rank))

    def close(self) -> None:
        """Ends every connection: the other ends read EOF."""
        for opened in (self._listener, *self._connections.values()):
            opened.close()
        self._connections.clear()

    def _admit(self, connection: socket.socket) -> None:
        hello = _receive(connection)
        if len(hello) != _HELLO.size:
            raise ConnectionError("not a plan socket's hello")
        magic, rank, replica, epoch = _HELLO.unpack(hello)
        refusal = self._refusal(magic, rank, replica, epoch)
        _send(connection, refusal.encode())
        if refusal:
            connection.close()
            return
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connections[rank] = connection

    def _refusal(self, magic: bytes, rank: int, replica: int, epoch: int) -> str:
        """Why a hello is refused, or "". The term is not compared: it may rise while an epoch lives."""
        if magic != _MAGIC:
            return f"this leader speaks {_MAGIC!r}, not {magic!r}"
        if (replica, epoch) != (self._fence.replica, self._fence.epoch):
            return (
                f"this leader serves replica {self._fence.replica} epoch {self._fence.epoch}, "
                f"not replica {replica} epoch {epoch}"
            )
        if rank not in self._expected or rank in self._connections:
            return f"rank {rank} is not expected here, or is connected already"
        return ""


class PlanReceiver:
    """A rank's end: an iterator over payloads that blocks for the next one, and raises ConnectionError at EOF."""

    def __init__(self, address: str, rank: int, fence: Fence, timeout_s: float) -> None:
        self._socket = _connect(address, timeout_s)
        try:
            _send(self._socket, _HELLO.pack(_MAGIC, rank, fence.replica, fence.epoch))
            refusal = _receive(self._socket)
            if refusal != _ACCEPTED:
                raise ConnectionRefusedError(f"{address}: {refusal.decode(errors='replace')}")
        except OSError:
            self._socket.close()
            raise
        self._socket.settimeout(None)

    def __iter__(self) -> Iterator[bytes]:
        while True:
            yield self.receive()

    def receive(self) -> bytes:
        """The next payload."""
        return _receive(self._socket)

    def close(self) -> None:
        """Ends the connection; a thread that blocks in receive() gets ConnectionError."""
        with contextlib.suppress(OSError):  # the other end may have been faster
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def _connect(address: str, timeout_s: float) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout_s)


def _send(connection: socket.socket, payload: bytes) -> None:
    connection.sendall(_LENGTH.pack(len(payload)) + payload)


def _receive(connection: socket.socket) -> bytes:
    (length,) = _LENGTH.unpack(_receive_exactly(connection, _LENGTH.size))
    if length > MAX_FRAME_BYTES:
        raise ConnectionError(f"a frame of {length} bytes is over the limit of {MAX_FRAME_BYTES}: not a plan")
    return bytes(_receive_exactly(connection, length))


def _receive_exactly(connection: socket.socket, count: int) -> bytearray:
    buffer = bytearray(count)
    view = memoryview(buffer)
    received = 0
    while received < count:
        step = connection.recv_into(view[received:])
        if not step:
            raise ConnectionError(f"the plan socket closed after {received} of {count} bytes of a frame")
        received += step
    return buffer
