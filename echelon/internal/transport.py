"""Carries out a session's effects over grpc, for `client.py`; `transport_aio.py` is its twin over grpc.aio.

One channel, which several transports may share; calls may run in several threads. Knows how to open, read and drop a
call, and nothing of what it means.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import weakref
from collections.abc import Generator
from typing import Any, Protocol, Self, TypeVar

import grpc
from google.protobuf.message import Message

from echelon import status
from echelon.errors import CancelledError, EchelonError
from echelon.internal import calls
from echelon.internal.channel import CLIENT_OPTIONS
from echelon.profiles import Settings
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
CLOSED = "the client is closed"


class _OpenCall(Protocol):
    def cancel(self) -> Any: ...


class Transport:
    """A channel to one coordinator, and the calls that are open on it."""

    def __init__(self, settings: Settings, parent: Transport | None = None) -> None:
        self.settings = settings
        self._parent = parent
        self._channel: grpc.Channel = (
            parent._channel if parent else grpc.insecure_channel(settings.address, options=CLIENT_OPTIONS)
        )
        self._children: weakref.WeakSet[Transport] = weakref.WeakSet()
        self._lock = threading.Lock()  # of the two below: a call that is opened is also closed
        self._open_calls: set[_OpenCall] = set()
        self._closed = threading.Event()

    def share(self, settings: Settings) -> Self:
        """Another transport over the same channel. It can be closed alone, and closes with this one."""
        child = type(self)(settings, self)
        with self._lock:
            self._children.add(child)
            if self._closed.is_set():
                child.close()
        return child

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
                            self._drop(open_call)
                            calls.log_retry(event, seconds)
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
        except EchelonError as error:
            error.request_id = error.request_id or call.request_id
            raise
        finally:
            if not sys.is_finalizing():  # then gRPC's threads stand still, and nothing that is said is sent
                self._drop(open_call)
                for effect in session.step(time.monotonic(), Cancel()):
                    if isinstance(effect, CancelRemote):
                        self._cancel(effect.request_id)

    def close(self) -> None:
        """Ends every call that still runs, those of its children too.

        Where the channel stays, their requests are cancelled at the server; where it closes they are parked.
        """
        with self._lock:
            self._closed.set()
            open_calls, children = list(self._open_calls), list(self._children)
        for child in children:
            child.close()
        if self._parent is not None:
            for open_call in open_calls:
                open_call.cancel()
            return
        # A Ctrl-C inside grpc's own start of a call leaves one that close() would wait for without end.
        closing = threading.Thread(target=self._channel.close, daemon=True)
        closing.start()
        closing.join(CLOSE_TIMEOUT_S)

    def _open(self, call: calls.Call[P, M, Y, R], effect: Open[P]) -> Any:
        method, payload = f"/{call.method}", call.request(effect.resume).SerializeToString()
        with self._lock:
            if self._closed.is_set():
                raise CancelledError(CLOSED)
            open_call: Any
            if call.streams:
                stream: grpc.UnaryStreamMultiCallable[bytes, Message] = self._channel.unary_stream(
                    method, response_deserializer=call.response.FromString
                )
                open_call = stream(payload, timeout=effect.timeout_s)
            else:
                unary: grpc.UnaryUnaryMultiCallable[bytes, Message] = self._channel.unary_unary(
                    method, response_deserializer=call.response.FromString
                )
                open_call = unary.future(payload, timeout=effect.timeout_s)
            self._open_calls.add(open_call)
        return open_call

    def _drop(self, open_call: _OpenCall | None) -> None:
        if open_call is not None:
            open_call.cancel()
            with self._lock:
                self._open_calls.discard(open_call)

    def _read(self, call: calls.Call[P, M, Y, R], open_call: Any) -> Event[M]:
        try:
            answer = next(open_call) if call.streams else open_call.result()
        except StopIteration:
            return Ended()
        except grpc.FutureCancelledError:
            raise CancelledError(CLOSED) from None
        except grpc.RpcError as error:
            if self._closed.is_set():
                raise CancelledError(CLOSED) from None
            return Broken(status.from_rpc(error, self.settings.address))
        return Received(call.decode(answer))

    def _cancel(self, request_id: str) -> None:
        once = Settings(self.settings.address, CANCEL_TIMEOUT_S, RetryPolicy(max_retries=0))
        with contextlib.suppress(EchelonError):
            self._root.finish(calls.cancel(once, [request_id]))

    @property
    def _root(self) -> Transport:
        return self if self._parent is None else self._parent._root
