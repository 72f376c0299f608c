"""The token journal's nouns: what is recorded of every request, and the state that the records add up to.

Lives in the coordinator. `JournalState.apply` is the one fold: the core uses it as it decides, the journal file as it
replays, so that a successor knows exactly what was written. Knows no bytes (`journal_codec`) and no file
(`journal_file`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby

from coordinator.clock import ClockOrigin
from coordinator.requests.nouns import Received, Request
from echelon.internal.link import Finish, Logprob


@dataclass(frozen=True, slots=True)
class Opened:
    """The request is known from here on. received: ids its client held of answers this journal did not know."""

    request: Request
    received: Received = ()


@dataclass(frozen=True, slots=True)
class Assigned:
    """This attempt was given to an epoch of a replica. recomputed_tokens: prefilled again so far.

    Attempts are numbered over all requests: an id may be used again once it is forgotten, and what a leader still
    tells of its older attempts must not pass for the new one's.
    """

    request_id: str
    attempt: int
    replica: int
    epoch: int
    recomputed_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Prompted:
    """The prompt has been computed: what of it was cached, and its log-probabilities where they were asked."""

    request_id: str
    attempt: int
    cached_tokens: int
    logprobs: tuple[Logprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Tokens:
    """New ids of a choice, from place first_token on. attempt 0: its client held them, the journal did not."""

    request_id: str
    attempt: int
    first_token: int
    ids: tuple[int, ...]
    logprobs: tuple[Logprob, ...] = ()
    choice: int = 0


@dataclass(frozen=True, slots=True)
class Finished:
    """The request's end: a finish for each choice, or the error that ended it."""

    request_id: str
    finished_unix_s: float
    finishes: tuple[Finish, ...] = ()
    error_reason: str = ""
    error_message: str = ""


@dataclass(frozen=True, slots=True)
class Forgotten:
    """Nothing of the request is remembered any more."""

    request_id: str


Record = ClockOrigin | Opened | Assigned | Prompted | Tokens | Finished | Forgotten


@dataclass(slots=True)
class Answer:
    """What is known of one choice. logprobs stand beside ids, None where no record carried one."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[Logprob | None] = field(default_factory=list)

    def records(self, request_id: str, attempt: int, choice: int) -> Iterator[Tokens]:
        """The fewest records that lead to this answer."""
        first = 0
        for unknown, group in groupby(self.logprobs, key=lambda logprob: logprob is None):
            logprobs = tuple(group)
            ids = tuple(self.ids[first : first + len(logprobs)])
            known = () if unknown else tuple(logprob for logprob in logprobs if logprob is not None)
            yield Tokens(request_id, attempt, first, ids, known, choice)
            first += len(ids)


@dataclass(slots=True)
class Entry:
    """What the journal knows of one request; answers by choice."""

    request: Request
    answers: list[Answer]
    assigned: Assigned | None = None
    prompted: Prompted | None = None
    finished: Finished | None = None

    @classmethod
    def open(cls, opened: Opened) -> Entry:
        held = [list(ids) for ids in opened.received]
        held += [[] for _ in range(opened.request.sampling.n - len(held))]
        return cls(opened.request, [Answer(ids, [None] * len(ids)) for ids in held])

    @property
    def attempt(self) -> int:
        return self.assigned.attempt if self.assigned else 0

    @property
    def replica(self) -> int | None:
        """That it was given to last."""
        return self.assigned.replica if self.assigned else None

    @property
    def epoch(self) -> int:
        """Of the replica that it was given to last."""
        return self.assigned.epoch if self.assigned else 0

    @property
    def recomputed_tokens(self) -> int:
        return self.assigned.recomputed_tokens if self.assigned else 0

    @property
    def generated_tokens(self) -> int:
        return sum(len(answer.ids) for answer in self.answers)

    def shift(self, later_s: float) -> None:
        """Its times, so much later."""
        request = self.request
        deadline_unix_s, opened_unix_s = request.deadline_unix_s + later_s, request.opened_unix_s + later_s
        self.request = replace(request, deadline_unix_s=deadline_unix_s, opened_unix_s=opened_unix_s)
        if self.finished:
            self.finished = replace(self.finished, finished_unix_s=self.finished.finished_unix_s + later_s)

    def records(self) -> Iterator[Record]:
        """The fewest records that lead to this entry."""
        yield Opened(self.request)
        for choice, answer in enumerate(self.answers):
            yield from answer.records(self.request.request_id, self.attempt, choice)
        yield from (record for record in (self.assigned, self.prompted, self.finished) if record)


@dataclass(slots=True)
class JournalState:
    """All remembered requests by id. last_attempt: the highest number that was given to one. origin: of all times.

    Applying some last records a second time, in order, changes nothing: compaction relies on it.
    """

    entries: dict[str, Entry] = field(default_factory=dict)
    last_attempt: int = 0
    origin: ClockOrigin | None = None

    def apply(self, record: Record) -> None:
        """Fold one record in. Records of requests that are not remembered change nothing but the last attempt."""
        match record:
            case Tokens():
                self._add_tokens(record)
            case Opened(request):
                self.entries[request.request_id] = Entry.open(record)
            case Assigned(request_id, attempt):
                self.last_attempt = max(self.last_attempt, attempt)
                if entry := self.entries.get(request_id):
                    entry.assigned = record
            case Prompted(request_id):
                if (entry := self.entries.get(request_id)) and entry.prompted is None:
                    entry.prompted = record
            case Finished(request_id):
                if entry := self.entries.get(request_id):
                    entry.finished = record
            case Forgotten(request_id):
                self.entries.pop(request_id, None)
            case ClockOrigin():
                self.origin = record

    def apply_all(self, records: Iterable[Record]) -> None:
        for record in records:
            self.apply(record)

    def resume(self, origin: ClockOrigin) -> None:
        """From now on times count from here; those that are remembered are translated."""
        later_s = origin.seconds_after(self.origin)
        self.origin = origin
        if later_s:
            for entry in self.entries.values():
                entry.shift(later_s)

    def head(self) -> Iterator[Record]:
        """What stands before all requests."""
        if self.origin:
            yield self.origin
        if self.last_attempt:
            yield Assigned("", self.last_attempt, 0, 0)

    def records(self) -> Iterator[Record]:
        """The fewest records that lead to this state."""
        yield from self.head()
        for entry in self.entries.values():
            yield from entry.records()

    def _add_tokens(self, record: Tokens) -> None:
        entry = self.entries.get(record.request_id)
        if entry is None:
            return
        # Where records before these were lost with a damaged file, the client's own ids carry the request on.
        if record.choice >= len(entry.answers) or record.first_token > len(entry.answers[record.choice].ids):
            del self.entries[record.request_id]
            return
        answer = entry.answers[record.choice]
        held = len(answer.ids) - record.first_token
        answer.ids.extend(record.ids[held:])
        answer.logprobs.extend(record.logprobs[held:] if record.logprobs else [None] * len(record.ids[held:]))
