"""The synchronous client: generate, stream, batch jobs, and a look at the cluster.

Thin: what a call means is in `internal/calls.py`, when it is tried again in `session.py`. May be shared by threads.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Literal, Self, Unpack, overload

from echelon.errors import EchelonError
from echelon.internal import calls, mapping
from echelon.internal.generate import GenerateCall, GenerateOptions, MapInput, admitted, generate_input, in_form_of
from echelon.internal.generate import generate as generate_call
from echelon.internal.transport import CANCEL_TIMEOUT_S, Transport
from echelon.jobs import Jobs
from echelon.profiles import Given, client_settings
from echelon.retry import RetryPolicy
from echelon.session import Finish
from echelon.structured import M, ParsedCompletion, parse
from echelon.types import Admitted, Cluster, ClusterEvent, Completion, ExpertLoad, Model, Rank, StreamEvent


class Client:
    """A connection to a coordinator, made at the first call.

    timeout_s bounds each call, tries again included; a generation may bring its own. A coordinator that is away or
    asks to wait is tried again until then, or max_retries times; a broken stream goes on at the next token. What is
    not given comes from the environment, from the profile or its default: see `profiles.py`.
    """

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
        self._transport = Transport(self._settings)
        self.jobs = Jobs(self._transport)

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
        other.jobs = Jobs(other._transport)
        return other

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self._settings.address!r})"

    def close(self) -> None:
        """Close the connection; requests that run at the server are parked, not cancelled."""
        self._transport.close()

    @overload
    def generate(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> Completion: ...

    @overload
    def generate(
        self, prompt: str | None = None, *, response_model: type[M], **options: Unpack[GenerateOptions]
    ) -> ParsedCompletion[M]: ...

    def generate(
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
            return self._transport.finish(generate_call(self._settings, prompt, options))
        call = generate_call(self._settings, prompt, in_form_of(response_model, options))
        return parse(self._transport.finish(call), response_model)

    def stream(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> Stream:
        """The same, token by token. Leaving the loop early, or close(), cancels the request."""
        return Stream(self._transport, generate_call(self._settings, prompt, options))

    @overload
    def map(
        self,
        prompts: Iterable[MapInput],
        *,
        concurrency: int = ...,
        return_exceptions: Literal[False] = ...,
        **options: Unpack[GenerateOptions],
    ) -> Generator[Completion, None, None]: ...

    @overload
    def map(
        self,
        prompts: Iterable[MapInput],
        *,
        concurrency: int = ...,
        return_exceptions: bool,
        **options: Unpack[GenerateOptions],
    ) -> Generator[Completion | EchelonError, None, None]: ...

    def map(
        self,
        prompts: Iterable[MapInput],
        *,
        concurrency: int = mapping.DEFAULT_CONCURRENCY,
        return_exceptions: bool = False,
        **options: Unpack[GenerateOptions],
    ) -> Generator[Completion | EchelonError, None, None]:
        """The answer to each prompt, in their order, with at most `concurrency` asked at once.

        A prompt is a string, or a mapping of generate()'s options that go before those of all. Prompts are taken as
        they are needed. An error is raised in its place and ends the map, or stands there with return_exceptions.
        Leaving early, or close(), cancels what runs.
        """
        mapping.check(concurrency, options)
        return self._map(prompts, concurrency, return_exceptions, options)

    def _map(
        self, prompts: Iterable[MapInput], concurrency: int, return_exceptions: bool, options: GenerateOptions
    ) -> Generator[Completion | EchelonError, None, None]:
        workers, scope = mapping.Workers(concurrency), self._transport.share(self._settings)

        def ask(item: MapInput) -> Completion | EchelonError:
            try:
                return scope.finish(generate_input(self._settings, item, options))
            except EchelonError as error:
                return error

        def start(item: MapInput) -> Future[Completion | EchelonError]:
            return workers.submit(lambda: ask(item))

        try:
            for future in mapping.in_order(prompts, start, concurrency):
                yield mapping.outcome(future.result(), return_exceptions)
        finally:
            if not sys.is_finalizing():  # then the threads stand still, and may hold what this would wait for
                scope.close()
                workers.close(2 * CANCEL_TIMEOUT_S)

    def tokenize(self, text: str, *, model: str = "") -> tuple[int, ...]:
        """The ids that a generation would be given for this text."""
        return self._transport.finish(calls.tokenize(self._settings, text, model))

    def detokenize(self, token_ids: Sequence[int], *, model: str = "") -> str:
        """The text of these ids, special tokens left out."""
        return self._transport.finish(calls.detokenize(self._settings, token_ids, model))

    def cancel(self, *request_ids: str) -> tuple[str, ...]:
        """End requests by id; answers those that were running."""
        return self._transport.finish(calls.cancel(self._settings, request_ids))

    def models(self) -> list[Model]:
        """What is served."""
        return self._transport.finish(calls.list_models(self._settings))

    def cluster(self) -> Cluster:
        """Everything that serves, now."""
        return self._transport.finish(calls.get_cluster(self._settings))

    def ranks(self) -> tuple[Rank, ...]:
        """One entry a device, in the order of the mesh."""
        return self.cluster().ranks

    def expert_load(self) -> list[ExpertLoad]:
        """How often each expert was chosen, by replica and layer; empty for a model without experts."""
        return self._transport.finish(calls.get_expert_load(self._settings))

    def events(self, *, after: int = 0, follow: bool = True) -> Iterator[ClusterEvent]:
        """The coordinator's decisions and observations after that sequence; follow waits for new ones."""
        return self._transport.items(calls.watch_events(self._settings, after, follow))


class Stream(Iterator[StreamEvent]):
    """Tokens of one request as they come. After the last one, `completion` is the whole answer."""

    def __init__(self, transport: Transport, call: GenerateCall) -> None:
        self.request_id = call.session.key
        self.completion: Completion | None = None
        self._call = call
        self._effects = transport.run(call)

    def __next__(self) -> StreamEvent:
        for effect in self._effects:
            if isinstance(effect, Finish):
                self.completion = effect.result
            else:
                return effect.value
        raise StopIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def admitted(self) -> Admitted | None:
        """The prompt's length and the seed, once the server has taken the request."""
        return admitted(self._call)

    def close(self) -> None:
        """Cancel the request, unless it has ended."""
        self._effects.close()
