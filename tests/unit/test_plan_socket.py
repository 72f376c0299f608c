"""Plan sockets: frames in order and whole, ranks and epochs checked, ends that are heard on the other side."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from echelon.internal.link import Fence
from worker.plan_socket import MAX_FRAME_BYTES, PlanReceiver, PlanServer

FENCE = Fence(term=3, replica=1, epoch=9)
TIMEOUT_S = 20.0
HOST = "127.0.0.1"


@pytest.fixture
def server() -> Iterator[PlanServer]:
    with closing(PlanServer(FENCE, frozenset({0, 1}), HOST)) as opened:
        yield opened


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as threads:
        yield threads


def join(server: PlanServer, pool: ThreadPoolExecutor) -> list[PlanReceiver]:
    accepted = pool.submit(server.accept, TIMEOUT_S)
    receivers = [PlanReceiver(server.address, rank, FENCE, TIMEOUT_S) for rank in (1, 0)]
    accepted.result()
    return receivers


def everywhere(payload: bytes) -> Callable[[int], bytes]:
    return lambda rank: payload


def test_every_rank_gets_every_payload_in_order(server: PlanServer, pool: ThreadPoolExecutor) -> None:
    payloads = [b"", b"plan", bytes(range(256)) * 20_000]
    receivers = join(server, pool)

    def send() -> None:
        for payload in payloads:
            server.send(everywhere(payload), TIMEOUT_S)

    sent = pool.submit(send)

    def read(receiver: PlanReceiver) -> list[bytes]:
        return [payload for _, payload in zip(payloads, receiver, strict=False)]

    assert [future.result() for future in [pool.submit(read, receiver) for receiver in receivers]] == [payloads] * 2
    sent.result()
    for receiver in receivers:
        receiver.close()


def test_the_end_of_the_leader_is_an_error_at_the_ranks(server: PlanServer, pool: ThreadPoolExecutor) -> None:
    first, second = join(server, pool)
    server.send(everywhere(b"last"))
    server.close()
    for receiver in (first, second):
        assert receiver.receive() == b"last"
        with pytest.raises(ConnectionError, match="closed after 0 of 4 bytes"):
            receiver.receive()
        receiver.close()


def test_the_end_of_a_rank_is_an_error_at_the_leader(server: PlanServer, pool: ThreadPoolExecutor) -> None:
    first, second = join(server, pool)
    first.close()
    with pytest.raises(ConnectionError):
        for _ in range(1000):
            server.send(everywhere(b"x"), TIMEOUT_S)
    second.close()


def test_a_rank_that_stops_reading_does_not_block_the_leader(server: PlanServer, pool: ThreadPoolExecutor) -> None:
    receivers = join(server, pool)
    with pytest.raises(TimeoutError):
        server.send(everywhere(bytes(MAX_FRAME_BYTES)), timeout_s=0.05)
    for receiver in receivers:
        receiver.close()


def test_closing_wakes_a_rank_that_waits(server: PlanServer, pool: ThreadPoolExecutor) -> None:
    first, second = join(server, pool)
    started = threading.Event()

    def wait() -> bytes:
        started.set()
        return first.receive()

    waiting = pool.submit(wait)
    started.wait()
    first.close()
    with pytest.raises(OSError):
        waiting.result()
    second.close()


@pytest.mark.parametrize(
    ("fence", "rank", "why"),
    [
        (Fence(3, 1, 8), 0, "serves replica 1 epoch 9, not replica 1 epoch 8"),
        (Fence(3, 0, 9), 0, "serves replica 1 epoch 9, not replica 0 epoch 9"),
        (FENCE, 2, "rank 2 is not expected here"),
    ],
)
def test_strangers_are_refused_with_the_reason_and_the_others_still_join(
    server: PlanServer, pool: ThreadPoolExecutor, fence: Fence, rank: int, why: str
) -> None:
    accepted = pool.submit(server.accept, TIMEOUT_S)
    with pytest.raises(ConnectionRefusedError, match=why):
        PlanReceiver(server.address, rank, fence, TIMEOUT_S)
    first = PlanReceiver(server.address, 0, FENCE, TIMEOUT_S)
    with pytest.raises(ConnectionRefusedError, match="connected already"):
        PlanReceiver(server.address, 0, FENCE, TIMEOUT_S)
    later_term = PlanReceiver(server.address, 1, Fence(4, 1, 9), TIMEOUT_S)
    accepted.result()
    first.close()
    later_term.close()


def test_garbage_instead_of_a_hello_is_turned_away(pool: ThreadPoolExecutor) -> None:
    with closing(PlanServer(FENCE, frozenset({0}), HOST)) as server:
        port = int(server.address.rpartition(":")[2])
        accepted = pool.submit(server.accept, TIMEOUT_S)
        for garbage in (b"GET / HTTP/1.1\r\n\r\n", struct.pack("<I", 3) + b"abc"):
            with socket.create_connection((HOST, port), TIMEOUT_S) as stranger:
                stranger.sendall(garbage)
                with contextlib.suppress(ConnectionResetError):  # unread garbage makes the kernel reset
                    assert stranger.recv(1) == b""
        PlanReceiver(server.address, 0, FENCE, TIMEOUT_S).close()
        accepted.result()


def test_ranks_that_do_not_come_are_named(server: PlanServer) -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] did not connect"):
        server.accept(timeout_s=0.01)


def test_nobody_listening_is_an_error() -> None:
    server = PlanServer(FENCE, frozenset(), HOST)
    server.accept(timeout_s=1.0)
    server.close()
    with pytest.raises(OSError):
        PlanReceiver(server.address, 0, FENCE, TIMEOUT_S)
