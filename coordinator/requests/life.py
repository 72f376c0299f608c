"""One request's life in the coordinator, and what its stream is shown of it.

Part of the core; pure. What must survive a crash stands in the journal entry; the rest of a life can be lost: its
stream, its place, its detokenizer, the times of its first steps.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from coordinator.answer_text import AnswerText, Stops
from coordinator.journal.state import Answer, Entry, Finished
from coordinator.requests.nouns import Outcome, Received, Shown
from coordinator.requests.router import Size
from echelon.errors import WIRE_ERRORS, EchelonError, InternalError, InvalidRequestError
from echelon.internal.link import Assign, Finish, Logprob, Progress, Sampling
from echelon.types import Admitted, Choice, Completion, FinishReason, StreamEvent, Timing, TokenLogprob, Usage

_FINISH_REASONS = {Finish.STOP: FinishReason.STOP, Finish.LENGTH: FinishReason.LENGTH}
_ERRORS = {error.default_reason: error for error in WIRE_ERRORS} | dict.fromkeys(
    ("CONTEXT_TOO_LONG", "CONSTRAINT_FAILED", "NON_FINITE"), InvalidRequestError
)


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


NewText = Callable[[Stops], AnswerText]


@dataclass(slots=True, eq=False)
class Life:
    """A remembered request. stream is None while no client is attached, since detached_unix_s.

    arrival is its place among all requests. finishes: by choice, how it ended, None while it goes on. reached: whether
    a leader has ever had its last attempt. apart: a leader has let go of it by itself, for what others had computed for
    it may have been spoilt.
    """

    entry: Entry
    phase: Phase
    new_text: NewText
    arrival: int = 0
    stream: int | None = None
    detached_unix_s: float = 0.0
    assigned_unix_s: float | None = None
    first_token_unix_s: float | None = None
    reached: bool = True
    apart: bool = False
    stop_ids: frozenset[int] = frozenset()
    finishes: list[Finish | None] = field(default_factory=list)
    _texts: list[AnswerText] = field(default_factory=list)  # in step with the answers, or empty: nobody reads

    def __post_init__(self) -> None:
        self.stop_ids = frozenset(self.sampling.stop_token_ids)
        if self.entry.finished:
            self.finishes = list(self.entry.finished.finishes)
        else:
            self.judge_all()

    @property
    def request_id(self) -> str:
        return self.entry.request.request_id

    @property
    def sampling(self) -> Sampling:
        return self.entry.request.sampling

    @property
    def ended(self) -> bool:
        """Every choice has ended."""
        return None not in self.finishes

    @property
    def size(self) -> Size:
        """What a replica needs for the choices that go on."""
        prompt = len(self.entry.request.prompt)
        generated = tuple(len(answer.ids) for _, answer in self._going_on())
        return Size(prompt, generated, prompt + self.sampling.max_tokens)

    @property
    def recomputed_tokens(self) -> int:
        """What its next attempt computes once more: nothing of one that no leader has had."""
        return self.size.known_tokens if self.entry.attempt and self.reached else 0

    @property
    def cache_salt(self) -> str:
        """Under which its blocks are found: one that nobody else has, where it is to be computed apart."""
        return f"@{self.request_id}" if self.apart else self.entry.request.cache_salt

    def assign(self, now: float, attempt: int) -> Assign:
        """What a leader is told; on its way from now on."""
        self.reached = True
        if self.assigned_unix_s is None:
            self.assigned_unix_s = now
        request = self.entry.request
        return Assign(
            request=request.request_id,
            attempt=attempt,
            prompt=request.prompt,
            choices=self.progress(),
            sampling=request.sampling,
            priority=request.priority,
            cache_salt=self.cache_salt,
        )

    def progress(self) -> tuple[Progress, ...]:
        """The choices that go on, with the ids they have."""
        return tuple(Progress(choice, tuple(answer.ids)) for choice, answer in self._going_on())

    def ended_choices(self) -> tuple[int, ...]:
        """The choices that have ended, while others may go on."""
        return tuple(choice for choice, finish in enumerate(self.finishes) if finish)

    def _going_on(self) -> Iterator[tuple[int, Answer]]:
        return ((choice, self.entry.answers[choice]) for choice, finish in enumerate(self.finishes) if finish is None)

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

    # Judging

    def judge_all(self) -> None:
        """Anew from the ids that the entry has: stop strings need the text of all of them."""
        if self.sampling.stop:
            self._read_texts([len(answer.ids) for answer in self.entry.answers])
        self.finishes = [self._ending(choice) for choice in range(len(self.entry.answers))]

    def take(self, choice: int, ids: tuple[int, ...]) -> tuple[tuple[int, ...], str, Finish | None]:
        """Those of the next ids that belong to the answer, the text they settle, and how they end it, if they do.

        Called for every token. The ids are to be recorded before more are taken.
        """
        sampling, held, finish = self.entry.request.sampling, len(self.entry.answers[choice].ids), None
        if held + len(ids) >= sampling.max_tokens:
            ids, finish = ids[: sampling.max_tokens - held], Finish.LENGTH
        if not self.stop_ids.isdisjoint(ids):
            for place, token_id in enumerate(ids, start=1):
                if self._ends(token_id, held + place):
                    ids, finish = ids[:place], Finish.STOP
                    break
        if not self._texts:
            return ids, "", finish
        text = self._texts[choice]
        taken, piece = text.push(ids)
        return (ids[:taken], piece, Finish.STOP) if text.matched else (ids, piece, finish)

    def _ending(self, choice: int) -> Finish | None:
        ids = self.entry.answers[choice].ids
        if self._texts and self._texts[choice].matched:
            return Finish.STOP
        if ids and self._ends(ids[-1], len(ids)):
            return Finish.STOP
        return Finish.LENGTH if len(ids) >= self.sampling.max_tokens else None

    def _ends(self, token_id: int, count: int) -> bool:
        return token_id in self.stop_ids and count > self.sampling.min_tokens

    # Showing

    def attach(self, stream: int, received: Received) -> list[Shown]:
        """Take a stream whose client holds the first `received` ids of each choice: what it is shown at once."""
        request, answers = self.entry.request, self.entry.answers
        self.stream = stream
        held = [len(received[choice]) if choice < len(received) else 0 for choice in range(len(answers))]
        self._read_texts(held)
        shown: list[Shown] = [Admitted(request.request_id, len(request.prompt), request.sampling.seed)]
        for choice, first in enumerate(held):
            if ids := tuple(answers[choice].ids[first:]):
                shown.append(self.delta(choice, first, ids, self._texts[choice].push(ids)[1]))
        return shown

    def detach(self, now: float) -> None:
        self.stream = None
        self.detached_unix_s = now
        self.drop_texts()

    def drop_texts(self) -> None:
        """Nothing is computed that they would judge, and nobody reads; who attaches has them read anew."""
        self._texts = []

    def delta(self, choice: int, first: int, ids: tuple[int, ...], text: str) -> StreamEvent:
        """These ids of the entry, from place `first` on, with the text that they settle."""
        if self.sampling.logprobs is None:
            return StreamEvent(self.request_id, choice, first, text, ids)
        logprobs = self.entry.answers[choice].logprobs[first : first + len(ids)]
        return StreamEvent(self.request_id, choice, first, text, ids, _token_logprobs(ids, logprobs))

    def outcome(self) -> Outcome:
        """The one event that ends the attached stream of an ended request. Its text has what deltas held back."""
        assert self.entry.finished is not None
        finished, request, entry = self.entry.finished, self.entry.request, self.entry
        if not finished.finishes:
            return error_of(finished)
        prompted = entry.prompted
        return Completion(
            request_id=request.request_id,
            model=request.model,
            choices=tuple(self._choice(choice, finish) for choice, finish in enumerate(finished.finishes)),
            usage=Usage(
                prompt_tokens=len(request.prompt),
                completion_tokens=entry.generated_tokens,
                recomputed_tokens=entry.recomputed_tokens,
                cached_tokens=prompted.cached_tokens if prompted else 0,
            ),
            timing=self._timing(finished),
            prompt_logprobs=_token_logprobs(request.prompt[1:], prompted.logprobs)
            if prompted and prompted.logprobs
            else (),
        )

    def _choice(self, choice: int, finish: Finish) -> Choice:
        answer, text = self.entry.answers[choice], self._texts[choice]
        text.flush()
        return Choice(
            index=choice,
            text=text.text,
            token_ids=tuple(answer.ids),
            finish_reason=_FINISH_REASONS[finish],
            logprobs=_token_logprobs(answer.ids, answer.logprobs),
            matched_stop=text.matched,
        )

    def _read_texts(self, counts: Sequence[int]) -> None:
        """New texts, over the first so many ids of each choice."""
        sampling = self.sampling
        stops = Stops(sampling.stop, sampling.include_stop, sampling.min_tokens)
        self._texts = [self.new_text(stops) for _ in self.entry.answers]
        for text, answer, count in zip(self._texts, self.entry.answers, counts, strict=True):
            text.push(answer.ids[:count])

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
