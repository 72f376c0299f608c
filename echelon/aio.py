"""The asynchronous client; each method as in `client.py`.

Thin: what a call means is in `internal/calls.py`, when it is tried again in `session.py`. Belongs to one event loop.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Self, Unpack

from echelon.client import DEFAULT_ADDRESS, DEFAULT_TIMEOUT_S
from echelon.internal import calls
from echelon.internal.generate import GenerateCall, GenerateOptions, admitted
from echelon.internal.generate import generate as generate_call
from echelon.internal.transport_aio import AsyncTransport
from echelon.jobs import AsyncJobs
from echelon.retry import RetryPolicy
from echelon.session import Finish
from echelon.types import Admitted, Cluster, ClusterEvent, Completion, Model, Rank, StreamEvent


class AsyncClient:
    """A connection to a coordinator, made at the first call."""

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        retry: RetryPolicy = RetryPolicy(),  # noqa: B008  frozen
    ) -> None:
        self._settings = calls.Settings(address, timeout_s, retry)
        self._transport = AsyncTransport(self._settings)
        self.jobs = AsyncJobs(self._transport)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"AsyncClient({self._settings.address!r})"

    async def close(self) -> None:
        """Close the connection; requests that run at the server are parked, not cancelled."""
        await self._transport.close()

    async def generate(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> Completion:
        """One whole answer to a prompt, or to messages= or token_ids=."""
        return await self._transport.finish(generate_call(self._settings, prompt, options))

    def stream(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> AsyncStream:
        """The same, token by token. Leave with `async with` or close() to cancel the request."""
        return AsyncStream(self._transport, generate_call(self._settings, prompt, options))

    async def cancel(self, *request_ids: str) -> tuple[str, ...]:
        """End requests by id; answers those that were running."""
        return await self._transport.finish(calls.cancel(self._settings, request_ids))

    async def models(self) -> list[Model]:
        """What is served."""
        return await self._transport.finish(calls.list_models(self._settings))

    async def cluster(self) -> Cluster:
        """Everything that serves, now."""
        return await self._transport.finish(calls.get_cluster(self._settings))

    async def ranks(self) -> tuple[Rank, ...]:
        """One entry a device, in the order of the mesh."""
        return (await self.cluster()).ranks

    def events(self, *, after: int = 0, follow: bool = True) -> AsyncIterator[ClusterEvent]:
        """The coordinator's decisions and observations after that sequence; follow waits for new ones."""
        return self._transport.items(calls.watch_events(self._settings, after, follow))


class AsyncStream(AsyncIterator[StreamEvent]):
    """Tokens of one request as they come. After the last one, `completion` is the whole answer."""

    def __init__(self, transport: AsyncTransport, call: GenerateCall) -> None:
        self.request_id = call.session.key
        self.completion: Completion | None = None
        self._call = call
        self._effects = transport.run(call)

    async def __anext__(self) -> StreamEvent:
        async for effect in self._effects:
            if isinstance(effect, Finish):
                self.completion = effect.result
            else:
                return effect.value
        raise StopAsyncIteration

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def admitted(self) -> Admitted | None:
        """The prompt's length and the seed, once the server has taken the request."""
        return admitted(self._call)

    async def close(self) -> None:
        """Cancel the request, unless it has ended."""
        await self._effects.aclose()
