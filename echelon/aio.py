"""The asynchronous client; each method as in `client.py`.

Thin: what a call means is in `internal/calls.py`, when it is tried again in `session.py`. Belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from typing import Literal, Self, Unpack, overload

from echelon.errors import EchelonError
from echelon.internal import calls, mapping
from echelon.internal.generate import GenerateCall, GenerateOptions, MapInput, admitted, generate_input, in_form_of
from echelon.internal.generate import generate as generate_call
from echelon.internal.transport_aio import AsyncTransport
from echelon.jobs import AsyncJobs
from echelon.profiles import Given, client_settings
from echelon.retry import RetryPolicy
from echelon.session import Finish
from echelon.structured import M, ParsedCompletion, parse
from echelon.types import Admitted, Cluster, ClusterEvent, Completion, ExpertLoad, Model, Rank, StreamEvent


class AsyncClient:
    """A connection to a coordinator, made at the first call."""

    def __init__(
        self,
        address: str | None = None,
        *,
        profile: str | None = None,
        timeout_s: float | None = None,
        max_retries: int | None = None,
        retry: RetryPolicy | None = None,
    ) -> None:
        given = Given(address=address, profile=profile, timeout_s=timeout_s, max_retries=max_retries, retry=retry)
        self._settings = client_settings(given)
        self._transport = AsyncTransport(self._settings)
        self.jobs = AsyncJobs(self._transport)

    @property
    def address(self) -> str:
        """Where it connects."""
        return self._settings.address

    def with_options(self, *, timeout_s: float | None = None, max_retries: int | None = None) -> Self:
        """A light copy with other limits, over the same connection.

        It closes with this client. Closing the copy alone cancels what runs through it and leaves the connection.
        """
        other = copy.copy(self)
        other._settings = self._settings.changed(timeout_s, max_retries)
        other._transport = self._transport.share(other._settings)
        other.jobs = AsyncJobs(other._transport)
        return other

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"AsyncClient({self._settings.address!r})"

    async def close(self) -> None:
        """Close the connection; requests that run at the server are parked, not cancelled."""
        await self._transport.close()

    @overload
    async def generate(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> Completion: ...

    @overload
    async def generate(
        self, prompt: str | None = None, *, response_model: type[M], **options: Unpack[GenerateOptions]
    ) -> ParsedCompletion[M]: ...

    async def generate(
        self,
        prompt: str | None = None,
        *,
        response_model: type[M] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Completion | ParsedCompletion[M]:
        """One whole answer to a prompt, or to messages= or token_ids=.

        response_model: a pydantic model, whose JSON the answer is made to be and is read as; see `structured.py`.
        """
        if response_model is None:
            return await self._transport.finish(generate_call(self._settings, prompt, options))
        call = generate_call(self._settings, prompt, in_form_of(response_model, options))
        return parse(await self._transport.finish(call), response_model)

    def stream(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> AsyncStream:
        """The same, token by token. Leave with `async with` or close() to cancel the request."""
        return AsyncStream(self._transport, generate_call(self._settings, prompt, options))

    @overload
    def map(
        self,
        prompts: Iterable[MapInput],
        *,
        concurrency: int = ...,
        return_exceptions: Literal[False] = ...,
        **options: Unpack[GenerateOptions],
    ) -> AsyncGenerator[Completion, None]: ...

    @overload
    def map(
        self,
        prompts: Iterable[MapInput],
        *,
        concurrency: int = ...,
        return_exceptions: bool,
        **options: Unpack[GenerateOptions],
    ) -> AsyncGenerator[Completion | EchelonError, None]: ...

    def map(
        self,
        prompts: Iterable[MapInput],
        *,
        concurrency: int = mapping.DEFAULT_CONCURRENCY,
        return_exceptions: bool = False,
        **options: Unpack[GenerateOptions],
    ) -> AsyncGenerator[Completion | EchelonError, None]:
        """The answer to each prompt, in their order: `async for`. Leave early by aclose(), as contextlib.aclosing."""
        mapping.check(concurrency, options)
        return self._map(prompts, concurrency, return_exceptions, options)

    async def _map(
        self, prompts: Iterable[MapInput], concurrency: int, return_exceptions: bool, options: GenerateOptions
    ) -> AsyncGenerator[Completion | EchelonError, None]:
        places, tasks = asyncio.Semaphore(concurrency), set[asyncio.Task[Completion | EchelonError]]()

        async def ask(item: MapInput) -> Completion | EchelonError:
            try:
                async with places:
                    return await self._transport.finish(generate_input(self._settings, item, options))
            except EchelonError as error:
                return error

        def start(item: MapInput) -> asyncio.Task[Completion | EchelonError]:
            task = asyncio.create_task(ask(item))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            return task

        try:
            for task in mapping.in_order(prompts, start, concurrency):
                yield mapping.outcome(await task, return_exceptions)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def tokenize(self, text: str, *, model: str = "") -> tuple[int, ...]:
        """The ids that a generation would be given for this text."""
        return await self._transport.finish(calls.tokenize(self._settings, text, model))

    async def detokenize(self, token_ids: Sequence[int], *, model: str = "") -> str:
        """The text of these ids, special tokens left out."""
        return await self._transport.finish(calls.detokenize(self._settings, token_ids, model))

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

    async def expert_load(self) -> list[ExpertLoad]:
        """How often each expert was chosen, by replica and layer; empty for a model without experts."""
        return await self._transport.finish(calls.get_expert_load(self._settings))

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
