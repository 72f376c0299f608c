"""The synchronous client: generate, stream, batch jobs, and a look at the cluster.

Thin: what a call means is in `internal/calls.py`, when it is tried again in `session.py`. May be shared by threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self, Unpack

from echelon.internal import calls
from echelon.internal.generate import GenerateCall, GenerateOptions, admitted
from echelon.internal.generate import generate as generate_call
from echelon.internal.transport import Transport
from echelon.jobs import Jobs
from echelon.retry import RetryPolicy
from echelon.session import Finish
from echelon.types import Admitted, Cluster, ClusterEvent, Completion, Model, Rank, StreamEvent

DEFAULT_ADDRESS = "localhost:50051"
DEFAULT_TIMEOUT_S = 600.0


class Client:
    """A connection to a coordinator, made at the first call.

    timeout_s bounds each call, tries again included; a generation may bring its own. A coordinator that is away or
    asks to wait is tried again until then; a broken stream goes on at the next token.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        retry: RetryPolicy = RetryPolicy(),  # noqa: B008  frozen
    ) -> None:
        self._settings = calls.Settings(address, timeout_s, retry)
        self._transport = Transport(self._settings)
        self.jobs = Jobs(self._transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self._settings.address!r})"

    def close(self) -> None:
        """Close the connection; requests that run at the server are parked, not cancelled."""
        self._transport.close()

    def generate(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> Completion:
        """One whole answer to a prompt, or to messages= or token_ids=."""
        return self._transport.finish(generate_call(self._settings, prompt, options))

    def stream(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> Stream:
        """The same, token by token. Leaving the loop early, or close(), cancels the request."""
        return Stream(self._transport, generate_call(self._settings, prompt, options))

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
