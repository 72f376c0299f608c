"""Carries out a session's effects over grpc, for `client.py`; `transport_aio.py` is its twin over grpc.aio.

One channel; calls may run in several threads. Knows how to open, read and drop a call, and nothing of what it means.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Generator
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf.message import Message

from echelon import status
from echelon.errors import CancelledError, ConfigError, EchelonError
from echelon.internal import calls
from echelon.internal.channel import CLIENT_OPTIONS
from echelon.retry import RetryPolicy
from echelon.session import (
    Broken,
    Cancel,
    CancelRemote,
    Ended,
    Event,
    Finish,
    Open,
    Raise,
    Received,
    Sleep,
    Start,
    Timer,
    Yield,
)

P = TypeVar("P")
M = TypeVar("M")
Y = TypeVar("Y")
R = TypeVar("R")

CLOSE_TIMEOUT_S = 5.0
CANCEL_TIMEOUT_S = 2.0  # the server ends the request at its deadline anyway


class _OpenCall(Protocol):
    def cancel(self) -> Any: ...


class Transport:
    """A channel to one coordinator."""

    def __init__(self, settings: calls.Settings) -> None:
        check_address(settings.address)
        calls.check_timeout(settings.timeout_s)
        self.settings = settings
        self._channel = grpc.insecure_channel(settings.address, options=CLIENT_OPTIONS)
        self._closed = threading.Event()

    def finish(self, call: calls.Call[P, M, Y, R]) -> R:
        """Run a call to its result."""
        with contextlib.closing(self.run(call)) as effects:
            for effect in effects:
                if isinstance(effect, Finish):
                    return effect.result
        raise AssertionError("a session ends with a result or an error")

    def items(self, call: calls.Call[P, M, Y, R]) -> Generator[Y, None, None]:
        """What a call hands on, until its end."""
        with contextlib.closing(self.run(call)) as effects:
            for effect in effects:
                if isinstance(effect, Yield):
                    yield effect.value

    def run(self, call: calls.Call[P, M, Y, R]) -> Generator[Yield[Y] | Finish[R], None, None]:
        """Everything a call hands on; closing the generator before its end cancels, at the server too."""
        session, open_call = call.session, None
        event: Event[M] = Start()
        try:
            while not session.ended:
                following: Event[M] | None = None
                for effect in session.step(time.monotonic(), event):
                    match effect:
                        case Open():
                            open_call = self._open(call, effect)
                        case Sleep(seconds):
                            _drop(open_call)
                            self._closed.wait(seconds)
                            following = Timer()
                        case Raise(error):
                            raise error
                        case CancelRemote():
                            raise AssertionError("only cancelled here, below")
                        case _:
                            yield effect
                if not session.ended:
                    event = following or self._read(call, open_call)
        finally:
            _drop(open_call)
            for effect in session.step(time.monotonic(), Cancel()):
                if isinstance(effect, CancelRemote):
                    self._cancel(effect.request_id)

    def close(self) -> None:
        """Ends every call that still runs; requests at the server are parked."""
        self._closed.set()
        # A Ctrl-C inside grpc's own start of a call leaves one that close() would wait for without end.
        closing = threading.Thread(target=self._channel.close, daemon=True)
        closing.start()
        closing.join(CLOSE_TIMEOUT_S)

    def _open(self, call: calls.Call[P, M, Y, R], effect: Open[P]) -> Any:
        if self._closed.is_set():
            raise CancelledError("the client is closed")
        method, payload = f"/{call.method}", call.request(effect.resume).SerializeToString()
        if call.streams:
            stream: grpc.UnaryStreamMultiCallable[bytes, Message] = self._channel.unary_stream(
                method, response_deserializer=call.response.FromString
            )
            return stream(payload, timeout=effect.timeout_s)
        unary: grpc.UnaryUnaryMultiCallable[bytes, Message] = self._channel.unary_unary(
            method, response_deserializer=call.response.FromString
        )
        return unary.future(payload, timeout=effect.timeout_s)

    def _read(self, call: calls.Call[P, M, Y, R], open_call: Any) -> Event[M]:
        try:
            answer = next(open_call) if call.streams else open_call.result()
        except StopIteration:
            return Ended()
        except grpc.RpcError as error:
            return Broken(status.from_rpc(error, self.settings.address))
        return Received(call.decode(answer))

    def _cancel(self, request_id: str) -> None:
        once = calls.Settings(self.settings.address, CANCEL_TIMEOUT_S, RetryPolicy(max_retries=0))
        with contextlib.suppress(EchelonError):
            self.finish(calls.cancel(once, [request_id]))


def check_address(address: str) -> None:
    """HOST:PORT, or unix:PATH; without its port gRPC would dial 443."""
    port = address.rpartition(":")[2]
    if not address.startswith("unix:") and not (port.isdecimal() and 0 < int(port) < 2**16):
        raise ConfigError(f"address must be HOST:PORT, got {address!r}", field="address")


def _drop(open_call: _OpenCall | None) -> None:
    if open_call is not None:
        open_call.cancel()
