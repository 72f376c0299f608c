"""One request's life in the coordinator, and what its stream is shown of it.

Part of the core; pure. What must survive a crash stands in the journal entry; the rest of a life can be lost: its
stream, its place, its detokenizer, the times of its first steps.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from coordinator.detokenizer import Detokenizer
from coordinator.journal.state import Entry, Finished
from coordinator.requests.nouns import Outcome, Shown
from echelon.errors import WIRE_ERRORS, EchelonError, InternalError, InvalidRequestError
from echelon.internal.link import Finish, Logprob
from echelon.types import Admitted, Completion, FinishReason, StreamEvent, Timing, TokenLogprob, Usage

_FINISH_REASONS = {Finish.STOP: FinishReason.STOP, Finish.LENGTH: FinishReason.LENGTH}
_ERRORS = {error.default_reason: error for error in WIRE_ERRORS} | {"CONTEXT_TOO_LONG": InvalidRequestError}


class Phase(enum.Enum):
    """Where a request stands. Parked: its stream is lost and nothing is computed for it."""

    QUEUED = "queued"
    RUNNING = "running"
    PARKED = "parked"
    ENDED = "ended"


class Due(enum.Enum):
    """What time alone does to a request."""

    FORGET = "forget"
    FAIL = "fail"
    PARK = "park"


@dataclass(slots=True, eq=False)
class Life:
    """A remembered request. stream is None while no client is attached, since detached_unix_s."""

    entry: Entry
    phase: Phase
    stop_ids: frozenset[int] = frozenset()
    stream: int | None = None
    detached_unix_s: float = 0.0
    assigned_unix_s: float | None = None
    first_token_unix_s: float | None = None
    _detokenizer: Detokenizer | None = None
    _text: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stop_ids = frozenset(self.entry.request.sampling.stop_token_ids)

    @property
    def request_id(self) -> str:
        return self.entry.request.request_id

    @property
    def context_tokens(self) -> int:
        """Prompt and everything that may be generated."""
        return len(self.entry.request.prompt) + self.entry.request.sampling.max_tokens

    def next_due(self, resume_window_s: float, reattach_s: float) -> tuple[float, Due]:
        """What comes next if nothing else happens, and when."""
        deadline = self.entry.request.deadline_unix_s, Due.FAIL
        if finished := self.entry.finished:
            return finished.finished_unix_s + resume_window_s, Due.FORGET
        if self.stream is not None:
            return deadline
        if self.phase is Phase.PARKED:
            return min(deadline, (self.detached_unix_s + resume_window_s, Due.FORGET), key=lambda due: due[0])
        return min(deadline, (self.detached_unix_s + reattach_s, Due.PARK), key=lambda due: due[0])

    def ending(self) -> Finish | None:
        """How the ids so far end the answer: at an end token, or at the limit."""
        ids, sampling = self.entry.ids, self.entry.request.sampling
        if ids and ids[-1] in self.stop_ids:
            return Finish.STOP
        return Finish.LENGTH if len(ids) >= sampling.max_tokens else None

    def cut(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Those of the next ids that belong to the answer: none after an end token or over the limit."""
        ids = ids[: self.entry.request.sampling.max_tokens - len(self.entry.ids)]
        if not self.stop_ids.isdisjoint(ids):
            end = next(place for place, token_id in enumerate(ids) if token_id in self.stop_ids)
            ids = ids[: end + 1]
        return ids

    def attach(self, stream: int, detokenizer: Detokenizer, received: int) -> list[Shown]:
        """Take a stream whose client holds the first `received` ids: what it has to be shown at once."""
        request = self.entry.request
        self.stream = stream
        self._detokenizer = detokenizer
        self._text = [detokenizer.push(self.entry.ids[:received])]
        admitted = Admitted(request.request_id, len(request.prompt), request.sampling.seed)
        return [admitted, self.delta(received)] if received < len(self.entry.ids) else [admitted]

    def detach(self, now: float) -> None:
        self.stream = None
        self.detached_unix_s = now
        self._detokenizer = None
        self._text = []

    def delta(self, first: int) -> StreamEvent:
        """The ids from this place on, with the text that they settle. To be called once for each id."""
        assert self._detokenizer is not None
        ids = tuple(self.entry.ids[first:])
        text = self._detokenizer.push(ids)
        self._text.append(text)
        if self.entry.request.sampling.logprobs is None:
            return StreamEvent(self.request_id, 0, first, text, ids)
        return StreamEvent(self.request_id, 0, first, text, ids, _token_logprobs(ids, self.entry.logprobs[first:]))

    def outcome(self) -> Outcome:
        """The one event that ends the attached stream of an ended request. Its text has what deltas held back."""
        assert self.entry.finished is not None
        assert self._detokenizer is not None
        finished, request = self.entry.finished, self.entry.request
        if finished.finish is None:
            return error_of(finished)
        text = "".join(self._text) + self._detokenizer.flush()
        return Completion(
            request_id=request.request_id,
            model=request.model,
            text=text,
            token_ids=tuple(self.entry.ids),
            finish_reason=_FINISH_REASONS[finished.finish],
            logprobs=_token_logprobs(self.entry.ids, self.entry.logprobs),
            usage=Usage(len(request.prompt), len(self.entry.ids), self.entry.recomputed_tokens),
            timing=self._timing(finished),
        )

    def _timing(self, finished: Finished) -> Timing:
        """Zero where a coordinator that is gone was the only one to know."""
        opened = self.entry.request.opened_unix_s
        assigned = opened if self.assigned_unix_s is None else self.assigned_unix_s
        first_token = opened if self.first_token_unix_s is None else self.first_token_unix_s
        return Timing(assigned - opened, first_token - opened, finished.finished_unix_s - opened)


def error_of(finished: Finished) -> EchelonError:
    """The error that ended a request, as first told."""
    kind = _ERRORS.get(finished.error_reason, InternalError)
    return kind(finished.error_message, reason=finished.error_reason, request_id=finished.request_id)


def _token_logprobs(ids: Sequence[int], logprobs: Sequence[Logprob | None]) -> tuple[TokenLogprob, ...]:
    """One for each id; none at all where some are not known, those of ids that came back from a client."""
    told: list[TokenLogprob] = []
    for token_id, logprob in zip(ids, logprobs, strict=True):
        if logprob is None:
            return ()
        told.append(
            TokenLogprob(token_id, logprob.logprob, tuple(zip(logprob.top_ids, logprob.top_logprobs, strict=True)))
        )
    return tuple(told)
