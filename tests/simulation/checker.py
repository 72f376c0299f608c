"""What must hold at every moment, whatever breaks: the judge of the simulation.

It keeps its own copy of what reached the disk, judges each answer there anew, token by token, and compares everything
that anyone is told with it.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from coordinator.journal.state import (
    Assigned,
    Entry,
    Finished,
    Forgotten,
    JournalState,
    Opened,
    Prompted,
    Record,
    Tokens,
)
from coordinator.requests.nouns import Outcome, Received, Shown
from echelon.errors import EchelonError
from echelon.internal.link import Logprob
from echelon.types import Admitted, Choice, Completion, StreamEvent, TokenLogprob, Usage
from tests.simulation.model import FINISHES, Reference, prompt_logprobs, told_logprob

SEEN = (  # of answers and streams
    "assigned before an older one",
    "cached prompt",
    "constraint broke",
    "end token before min_tokens",
    "ended by a stop string",
    "logprobs of the prompt",
    "logprobs of tokens",
    "one choice abandoned",
    "resumed with several choices",
    "several choices",
    "stop string kept",
    "taken over by another replica",
    "text held back",
)


class Violation(AssertionError):
    """A promise is broken."""


def require(holds: object, message: str, *values: object) -> None:
    """The message is formatted only when it is needed: values are long, and this is called often."""
    if not holds:
        raise Violation(message.format(*values))


@dataclass(slots=True)
class Written:
    """What reached the disk of one request. place: its turn. recomputed_tokens: given to replicas once more.

    never_had: of these, where no leader had had them before; a coordinator that dies at once may not know that.

    coordinators: which one assigned each attempt, counted from the first. told: the last attempt that brought tokens.
    gaps: attempts of which tokens were acknowledged and not recorded: nobody read them, or the disk was full.
    damaged: its records were lost once, and its client may have told of them.
    """

    place: tuple[int, int]
    answers: list[Reference]
    recomputed_tokens: int = 0
    never_had: int = 0
    coordinators: dict[int, int] = field(default_factory=dict)
    gaps: set[int] = field(default_factory=set)
    told: int = 0
    damaged: bool = False


@dataclass(slots=True)
class StreamHistory:
    """What one stream of the coordinator was shown: of each choice, how many tokens its client holds."""

    request_id: str
    positions: list[int]
    admitted: bool = False
    ended: bool = False


@dataclass(slots=True)
class Checker:
    """Told of every write, every delivery and every end."""

    disk: JournalState = field(default_factory=JournalState)
    streams: dict[int, StreamHistory] = field(default_factory=dict)
    told: Counter[str] = field(default_factory=Counter)  # events by kind
    seen: Counter[str] = field(default_factory=Counter)  # of SEEN
    tokens: int = 0
    had: set[tuple[str, int]] = field(default_factory=set)  # requests and attempts that came to their leaders
    _opens: int = 0
    _coordinators: int = 0
    _written: dict[str, Written] = field(default_factory=dict)

    def written(self, records: list[Record]) -> None:
        """These records reached the disk."""
        for record in records:
            match record:
                case Opened():
                    self._opened(record)
                case Assigned(request_id):
                    entry = self.disk.entries[request_id]
                    last = self.disk.last_attempt
                    require(record.attempt > last, "{} after attempt {}", record, last)
                    self._assignment(record, entry)
                case Prompted():
                    self._prompted(record)
                case Tokens():
                    self._tokens(record)
                case Finished():
                    self._finished(record)
                case Forgotten(request_id):
                    del self._written[request_id]
            self.disk.apply(record)

    def restarted(self, state: JournalState, lost: bool) -> None:
        """A coordinator has read the disk. lost: the disk may lack the last of what was told of as written."""
        if lost and state != self.disk:
            self.seen["written again after the disk lost it"] += 1
            self.disk = copy.deepcopy(state)
            self._written = {request_id: self._restored(entry) for request_id, entry in state.entries.items()}
        require(state == self.disk, "replay differs from what was written")
        self._coordinators += 1

    def _restored(self, entry: Entry) -> Written:
        """Of a request whose last records are gone."""
        answers = [Reference(entry.request, choice) for choice in range(entry.request.sampling.n)]
        self._opens += 1  # in the journal's order: that it was forgotten, or opened again since, may be what was lost
        place = entry.request.priority, self._opens
        written = Written(place, answers, entry.recomputed_tokens, gaps={entry.attempt}, damaged=True)
        for answer, held in zip(answers, entry.answers, strict=True):
            for token_id, logprob in zip(held.ids, held.logprobs, strict=True):
                self._push(answer, token_id, logprob)
        return written

    def told_by(self, request_id: str) -> int:
        """The last attempt that brought tokens; 0 before the first."""
        return self._written[request_id].told

    def submitted(self, stream: int, request_id: str, choices: int, received: Received) -> None:
        held = [len(ids) for ids in received]
        self.streams[stream] = StreamHistory(request_id, held + [0] * (choices - len(held)))
        self.seen["resumed with several choices"] += sum(map(bool, held)) > 1

    def delivered(self, stream: int, event: Shown, superseded: bool = False) -> None:
        """A stream is shown this, and its client may have seen it from now on.

        superseded: by a coordinator that does not know of its successor yet, and can only repeat itself.
        """
        history = self.streams[stream]
        if superseded and history.request_id not in self._written:
            return
        require(not history.ended, "stream {} of {} goes on after its end: {}", stream, history.request_id, event)
        refused = isinstance(event, EchelonError)
        require(refused or history.admitted != isinstance(event, Admitted), "{} is out of turn", event)
        match event:
            case Admitted():
                history.admitted = True
            case StreamEvent():
                self._delta(history, event)
            case Completion():
                self._completion(history, event)
        history.ended = isinstance(event, Outcome)

    def assigned(self, assigned: list[str], waiting: list[str]) -> None:
        """These requests were assigned in a step that left those waiting."""
        for request_id in assigned:
            place = self._written[request_id].place
            ahead = [other for other in waiting if self._written[other].place < place]
            require(not ahead, "{} was assigned before {}", request_id, ahead)
            self.seen["assigned before an older one"] += any(
                self._written[other].place[1] < place[1] for other in waiting
            )

    def heard(self, kind: str, subject: str, detail: Mapping[str, Any]) -> None:
        """What is told of decisions."""
        self.told[kind] += 1
        reason = str(detail.get("reason"))
        self.seen["constraint broke"] += reason == "CONSTRAINT_FAILED"
        written = self._written.get(subject)
        if written and kind == "request.parked":
            written.gaps.add(self.disk.entries[subject].attempt)
        if written and kind == "request.replayed":
            # A leader keeps what it holds to its end, and tells every token in its turn. But what it told while a
            # coordinator had the request parked was acknowledged and dropped, and a successor knows nothing of parking.
            attempt = detail["attempt"]
            adopted = written.coordinators.get(attempt, 0) < self._coordinators and attempt in written.gaps
            lost = adopted or not reason.startswith(("its leader let go", "a run starts"))
            require(lost, "{} is replayed: {}", subject, reason)

    # On disk

    def _opened(self, record: Opened) -> None:
        request = record.request
        require(request.request_id not in self.disk.entries, "{} was opened twice", request.request_id)
        answers = [Reference(request, choice) for choice in range(request.sampling.n)]
        self._opens += 1
        self._written[request.request_id] = Written((request.priority, self._opens), answers)
        for answer, ids in zip(answers, record.received, strict=False):
            for token_id in ids:
                self._push(answer, token_id, None)

    def _assignment(self, record: Assigned, entry: Entry) -> None:
        written = self._written[record.request_id]
        going_on = [answer for answer in written.answers if not answer.ending]
        require(going_on, "{}, but every choice has ended", record)
        written.coordinators[record.attempt] = self._coordinators
        if entry.assigned and entry.assigned.replica != record.replica:
            self.seen["taken over by another replica"] += 1
        if entry.attempt:
            known = len(entry.request.prompt) + sum(len(answer.ids) for answer in going_on)
            written.recomputed_tokens += known
            written.never_had += known * ((record.request_id, entry.attempt) not in self.had)

    def _prompted(self, record: Prompted) -> None:
        entry = self.disk.entries[record.request_id]
        require(entry.prompted is None, "{} after {}", record, entry.prompted)
        prompt = entry.request.prompt
        told = tuple(map(told_logprob, prompt[1:], record.logprobs))
        require(told == prompt_logprobs(entry.request), "{} of {}", record, prompt)

    def _tokens(self, record: Tokens) -> None:
        entry = self.disk.entries[record.request_id]
        answer = self._written[record.request_id].answers[record.choice]
        require(record.first_token == len(answer.ids), "{} is written behind {} tokens", record, len(answer.ids))
        require(entry.finished is None, "{} is written after the end", record)
        asked = entry.request.sampling.logprobs is not None and record.attempt > 0
        require(len(record.logprobs) == asked * len(record.ids), "{}: logprobs asked: {}", record, asked)
        self._written[record.request_id].told = record.attempt
        logprobs: tuple[Logprob | None, ...] = record.logprobs or (None,) * len(record.ids)
        for token_id, logprob in zip(record.ids, logprobs, strict=True):
            self._push(answer, token_id, logprob)

    def _push(self, answer: Reference, token_id: int, logprob: Logprob | None) -> None:
        defect = answer.push(token_id, logprob)
        require(not defect, "{}, choice {}: {}", answer.request, answer.choice, defect)

    def _finished(self, record: Finished) -> None:
        entry, answers = self.disk.entries[record.request_id], self._written[record.request_id].answers
        require(entry.finished is None, "{} finished twice", record.request_id)
        if not record.error_reason:
            endings = tuple(answer.ending.finish if answer.ending else None for answer in answers)
            require(record.finishes == endings, "{}, but its choices ended in {}", record, endings)

    # Shown

    def _delta(self, history: StreamHistory, event: StreamEvent) -> None:
        entry, answer = self.disk.entries[history.request_id], self._written[history.request_id].answers[event.index]
        start = history.positions[event.index]
        end = history.positions[event.index] = start + len(event.token_ids)
        self.tokens += len(event.token_ids)
        require(event.sequence == start, "{}: {} after {} tokens", history.request_id, event, start)
        require(event.token_ids == tuple(answer.ids[start:end]), "{} is not what the journal holds", event)
        require(event.text == answer.delta(start, end), "{} is not the text {!r}", event, answer.delta(start, end))
        require(event.logprobs == self._logprobs(entry, event.index, start, end), "{}: its logprobs", event)

    def _logprobs(self, entry: Entry, choice: int, start: int, end: int) -> tuple[TokenLogprob, ...]:
        """What is known of them: nothing where some of these tokens came back from a client."""
        held = entry.answers[choice]
        known = [logprob for logprob in held.logprobs[start:end] if logprob is not None]
        ids = held.ids[start:end]
        return tuple(map(told_logprob, ids, known)) if len(known) == len(ids) else ()

    def _completion(self, history: StreamHistory, event: Completion) -> None:
        entry = self.disk.entries[history.request_id]
        written, request = self._written[history.request_id], entry.request
        require(entry.finished is not None, "{} is not in the journal", event)
        require([choice.index for choice in event.choices] == list(range(request.sampling.n)), "choices of {}", event)
        for choice, answer in zip(event.choices, written.answers, strict=True):
            self._choice(choice, answer, entry)
        counts = [len(answer.ids) for answer in written.answers]
        require(history.positions == counts, "{} ended before its last delta", history.request_id)
        cached = entry.prompted.cached_tokens if entry.prompted else 0
        recomputed = event.usage.recomputed_tokens
        least, most = written.recomputed_tokens - written.never_had, written.recomputed_tokens
        require(least <= recomputed <= most, "{}, but {} to {} recomputed", event.usage, least, most)
        usage = Usage(len(request.prompt), sum(counts), recomputed, cached)
        require(event.usage == usage, "{}, but {}", event.usage, usage)
        # A client that holds every token of every choice is answered without a replica.
        expected = prompt_logprobs(request) if entry.assigned else ()
        known = event.prompt_logprobs == expected or (written.damaged and not event.prompt_logprobs)
        require(known, "{} instead of {}", event.prompt_logprobs, expected)
        self._see(event, written)

    def _choice(self, choice: Choice, answer: Reference, entry: Entry) -> None:
        ending = answer.ending
        assert ending is not None
        require(choice.token_ids == tuple(answer.ids), "{} is not what the journal holds", choice)
        require(choice.text == ending.text, "{!r} is not the text {!r}", choice.text, ending.text)
        require(choice.matched_stop == ending.matched, "{} was ended by {!r}", choice, ending.matched)
        require(choice.finish_reason is FINISHES[ending.finish], "{} ended in {}", choice, ending.finish)
        logprobs = self._logprobs(entry, choice.index, 0, len(answer.ids))
        require(choice.logprobs == logprobs, "{}: its logprobs", choice)

    def _see(self, event: Completion, written: Written) -> None:
        """What this answer shows to have been tried."""
        sampling = written.answers[0].request.sampling
        endings = [answer.ending for answer in written.answers if answer.ending]
        early = [set(answer.ids[: sampling.min_tokens]) for answer in written.answers]
        self.seen["several choices"] += sampling.n > 1
        self.seen["ended by a stop string"] += sum(bool(ending.matched) for ending in endings)
        self.seen["stop string kept"] += sampling.include_stop and any(ending.matched for ending in endings)
        self.seen["text held back"] += sum(answer.held_back for answer in written.answers)
        self.seen["end token before min_tokens"] += any(ids.intersection(sampling.stop_token_ids) for ids in early)
        self.seen["logprobs of tokens"] += any(choice.logprobs for choice in event.choices)
        self.seen["logprobs of the prompt"] += bool(event.prompt_logprobs)
        self.seen["cached prompt"] += event.usage.cached_tokens > 0
