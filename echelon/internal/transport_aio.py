"""Carries out a session's effects over grpc.aio, for `aio.py`; the twin of `transport.py`, line by line.

One channel, made at the first call, in the event loop that runs then; several transports may share it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import weakref
from collections.abc import AsyncGenerator
from typing import Any, Self, TypeVar

import grpc
from google.protobuf.message import Message

from echelon import status
from echelon.errors import CancelledError, EchelonError
from echelon.internal import calls
from echelon.internal.channel import CLIENT_OPTIONS
from echelon.internal.transport import CANCEL_TIMEOUT_S, CLOSED
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


class AsyncTransport:
    """A channel to one coordinator, and the calls that are open on it."""

    def __init__(self, settings: Settings, parent: AsyncTransport | None = None) -> None:
        self.settings = settings
        self._parent = parent
        self._channel: grpc.aio.Channel | None = None  # the root's
        self._children: weakref.WeakSet[AsyncTransport] = weakref.WeakSet()
        self._open_calls: set[Any] = set()
        self._closed = False

    def share(self, settings: Settings) -> Self:
        """Another transport over the same channel. It can be closed alone, and closes with this one."""
        child = type(self)(settings, self)
        self._children.add(child)
        child._closed = self._closed
        return child

    async def finish(self, call: calls.Call[P, M, Y, R]) -> R:
        """Run a call to its result."""
        async with contextlib.aclosing(self.run(call)) as effects:
            async for effect in effects:
                if isinstance(effect, Finish):
                    return effect.result
        raise AssertionError("a session ends with a result or an error")

    async def items(self, call: calls.Call[P, M, Y, R]) -> AsyncGenerator[Y, None]:
        """What a call hands on, until its end."""
        async with contextlib.aclosing(self.run(call)) as effects:
            async for effect in effects:
                if isinstance(effect, Yield):
                    yield effect.value

    async def run(self, call: calls.Call[P, M, Y, R]) -> AsyncGenerator[Yield[Y] | Finish[R], None]:
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
                            await asyncio.sleep(seconds)
                            following = Timer()
                        case Raise(error):
                            raise error
                        case CancelRemote():
                            raise AssertionError("only cancelled here, below")
                        case _:
                            yield effect
                if not session.ended:
                    event = following or await self._read(call, open_call)
        except EchelonError as error:
            error.request_id = error.request_id or call.request_id
            raise
        finally:
            self._drop(open_call)
            for effect in session.step(time.monotonic(), Cancel()):
                if isinstance(effect, CancelRemote):
                    await self._cancel(effect.request_id)

    async def close(self) -> None:
        """Ends every call that still runs, those of its children too.

        Where the channel stays, their requests are cancelled at the server; where it closes they are parked.
        """
        self._closed = True
        for child in list(self._children):
            await child.close()
        if self._parent is not None:
            for open_call in self._open_calls:
                open_call.cancel()
        elif self._channel is not None:
            await self._channel.close()

    def _open(self, call: calls.Call[P, M, Y, R], effect: Open[P]) -> Any:
        method, payload = f"/{call.method}", call.request(effect.resume).SerializeToString()
        if self._closed:
            raise CancelledError(CLOSED)
        channel = self._root._connected()
        open_call: Any
        if call.streams:
            stream: grpc.aio.UnaryStreamMultiCallable[bytes, Message] = channel.unary_stream(
                method, response_deserializer=call.response.FromString
            )
            open_call = stream(payload, timeout=effect.timeout_s)
        else:
            unary: grpc.aio.UnaryUnaryMultiCallable[bytes, Message] = channel.unary_unary(
                method, response_deserializer=call.response.FromString
            )
            open_call = unary(payload, timeout=effect.timeout_s)
        self._open_calls.add(open_call)
        return open_call

    def _drop(self, open_call: Any) -> None:
        if open_call is not None:
            open_call.cancel()
            self._open_calls.discard(open_call)

    async def _read(self, call: calls.Call[P, M, Y, R], open_call: Any) -> Event[M]:
        try:
            answer = await (open_call.read() if call.streams else open_call)
        except grpc.aio.AioRpcError as error:
            if self._closed:
                raise CancelledError(CLOSED) from None
            return Broken(status.from_rpc(error, self.settings.address))
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._closed or (task is not None and task.cancelling()):
                raise
            raise CancelledError(CLOSED) from None  # close() cancels calls, not their tasks
        return Ended() if answer is grpc.aio.EOF else Received(call.decode(answer))

    async def _cancel(self, request_id: str) -> None:
        once = Settings(self.settings.address, CANCEL_TIMEOUT_S, RetryPolicy(max_retries=0))
        with contextlib.suppress(EchelonError):
            await self._root.finish(calls.cancel(once, [request_id]))

    @property
    def _root(self) -> AsyncTransport:
        return self if self._parent is None else self._parent._root

    def _connected(self) -> grpc.aio.Channel:
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(self.settings.address, options=CLIENT_OPTIONS)
        return self._channel
