"""The job runner: which items run, what is retried, what must be written, and when a job has ended.

A sans-IO machine in the coordinator: `step(now, event) -> effects`. It knows jobs by id and items by index, and neither
their prompts nor the database. What it shows of a job is what is on disk: states, counts and results change on
`Committed`, never before, so nothing that a user has seen can be taken back by a crash.
"""

from __future__ import annotations

import enum
import hashlib
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from coordinator.jobs.events import (
    CancelItem,
    CancelRequested,
    Changed,
    Committed,
    Effect,
    Event,
    Interrupted,
    ItemEnded,
    ItemInterrupted,
    ItemRecorded,
    Loaded,
    Outcome,
    Persist,
    StartItem,
    StateChanged,
    StoredJob,
    Tick,
    Wake,
    Write,
)
from echelon.errors import EchelonError
from echelon.sampling import SamplingParams
from echelon.types import Completion, ItemCounts, JobState, JobStatus


@dataclass(frozen=True, slots=True)
class JobConfig:
    """How many items of all jobs are held by the cluster at once, and how retries back off."""

    window_items: int = 256
    first_backoff_s: float = 0.5
    max_backoff_s: float = 30.0


def item_request_id(job_id: str, index: int) -> str:
    """The request id under which an item runs, the same at every try and after every restart."""
    return f"job.{job_id}.{index}"


def parse_item_request_id(request_id: str) -> tuple[str, int] | None:
    """(job_id, index) of an item's request id; None for any other request."""
    head, _, index = request_id.rpartition(".")
    kind, _, job_id = head.partition(".")
    return (job_id, int(index)) if kind == "job" and job_id and index.isdecimal() else None


def item_seed(job_id: str, index: int) -> int:
    """The seed of an item that names none: a function of its place, so that trying again answers the same."""
    return int.from_bytes(hashlib.sha256(f"{job_id}/{index}".encode()).digest()[:8], "big", signed=True)


def item_sampling(sampling: SamplingParams, job_id: str, index: int) -> SamplingParams:
    return sampling if sampling.seed is not None else replace(sampling, seed=item_seed(job_id, index))


def backoff_s(failures: int, error: EchelonError, config: JobConfig) -> float:
    """How long to wait after so many failures in a row; never less than the error asks for."""
    doubled = config.first_backoff_s * 2.0 ** min(failures - 1, 32)
    return max(min(doubled, config.max_backoff_s), error.retry_after_s or 0.0)


class _Phase(enum.Enum):
    """RUNNING -> RECORDING, or RUNNING -> WAITING -> RUNNING; CANCELLING from RUNNING."""

    RUNNING = "running"
    WAITING = "waiting"
    RECORDING = "recording"
    CANCELLING = "cancelling"


@dataclass(slots=True)
class _Flight:
    """An item that holds a place in the window: one that waits for its retry keeps it, or all others would fail too."""

    phase: _Phase = _Phase.RUNNING
    failures: int = 0
    due_unix_s: float = 0.0


@dataclass(slots=True, eq=False)
class _Job:
    """status is what is on disk, decided the state that was last asked to be written."""

    status: JobStatus
    decided: JobState
    last_cursor: int
    interrupted: set[int]
    pending: deque[int] = field(default_factory=deque)
    flights: dict[int, _Flight] = field(default_factory=dict)


class JobRunner:
    """All jobs of one coordinator. Items start in input order; jobs take turns."""

    def __init__(self, config: JobConfig) -> None:
        self._config = config
        self._jobs: dict[str, _Job] = {}
        self._turns: deque[_Job] = deque()  # jobs with pending items
        self._in_flight = 0
        self._due_unix_s = math.inf  # the earliest retry

    def status(self, job_id: str) -> JobStatus | None:
        job = self._jobs.get(job_id)
        return None if job is None else replace(job.status, counts=self._counts(job))

    def statuses(self) -> Iterator[JobStatus]:
        """Every job, the newest first."""
        return (replace(job.status, counts=self._counts(job)) for job in reversed(self._jobs.values()))

    def step(self, now: float, event: Event) -> list[Effect]:
        effects: list[Effect] = []
        match event:
            case Loaded(jobs):
                for stored in jobs:
                    self._load(now, stored, effects)
            case ItemEnded(job_id, index, outcome):
                self._end_item(now, self._jobs[job_id], index, outcome, effects)
            case Interrupted(job_id, index):
                self._interrupt(job_id, index, effects)
            case CancelRequested(job_id):
                self._cancel(now, self._jobs[job_id], effects)
            case Committed(writes):
                for write in writes:
                    self._commit(now, write, effects)
            case Tick():
                pass
        if now >= self._due_unix_s:
            self._retry(now, effects)
        self._fill_window(now, effects)
        return effects

    @staticmethod
    def _counts(job: _Job) -> ItemCounts:
        return replace(job.status.counts, running=len(job.flights))

    def _load(self, now: float, stored: StoredJob, effects: list[Effect]) -> None:
        status = stored.status
        if status.job_id in self._jobs:
            return
        job = _Job(status, status.state, stored.last_cursor, set(stored.interrupted))
        self._jobs[status.job_id] = job
        if status.state.ended:
            return
        left = [index for index in range(status.counts.total) if index not in stored.done]
        if status.state is JobState.CANCELLING:
            # the coordinator before this one may have left any of them running
            effects.extend(CancelItem(status.job_id, index) for index in left)
        elif left:
            job.pending.extend(left)
            self._turns.append(job)
        self._end_if_done(now, job, effects)

    def _end_item(self, now: float, job: _Job, index: int, outcome: Outcome, effects: list[Effect]) -> None:
        flight = job.flights.get(index)
        if flight is None or flight.phase not in (_Phase.RUNNING, _Phase.CANCELLING):
            return
        given_up = flight.phase is _Phase.CANCELLING and isinstance(outcome, EchelonError)
        if given_up:  # cancelled before it had an answer: it has no result at all
            self._land(job, index)
            self._end_if_done(now, job, effects)
        elif isinstance(outcome, EchelonError) and outcome.retryable:
            flight.failures += 1
            flight.phase = _Phase.WAITING
            flight.due_unix_s = now + backoff_s(flight.failures, outcome, self._config)
            self._wake_by(flight.due_unix_s, effects)
        else:
            flight.phase = _Phase.RECORDING
            job.last_cursor += 1
            effects.append(Persist(ItemRecorded(job.status.job_id, index, job.last_cursor, outcome)))

    def _interrupt(self, job_id: str, index: int, effects: list[Effect]) -> None:
        job = self._jobs.get(job_id)
        if job is not None and index in job.flights and index not in job.interrupted:
            job.interrupted.add(index)
            effects.append(Persist(ItemInterrupted(job_id, index)))

    def _cancel(self, now: float, job: _Job, effects: list[Effect]) -> None:
        if job.decided not in (JobState.QUEUED, JobState.RUNNING):
            return
        self._decide(now, job, JobState.CANCELLING, effects)
        if job.pending:
            job.pending.clear()
            self._turns.remove(job)
        self._end_if_done(now, job, effects)

    def _recall(self, job: _Job, effects: list[Effect]) -> None:
        """End what is in flight. Not before the cancel is on disk: a successor that does not know of it would start
        the items again, find their requests cancelled, and record them as failed.
        """
        for index, flight in list(job.flights.items()):
            if flight.phase is _Phase.WAITING:
                self._land(job, index)
            elif flight.phase is _Phase.RUNNING:
                flight.phase = _Phase.CANCELLING
                effects.append(CancelItem(job.status.job_id, index))

    def _commit(self, now: float, write: Write, effects: list[Effect]) -> None:
        job = self._jobs[write.job_id]
        status, counts = job.status, job.status.counts
        match write:
            case StateChanged(_, state, unix_s):
                started = unix_s if state is JobState.RUNNING else status.start_unix_s
                ended = unix_s if state.ended else status.end_unix_s
                job.status = replace(status, state=state, start_unix_s=started, end_unix_s=ended)
                if state is JobState.CANCELLING:
                    self._recall(job, effects)
            case ItemRecorded(_, index, _, Completion(usage=usage)):
                counts = replace(counts, succeeded=counts.succeeded + 1)
                job.status = replace(status, counts=counts, usage=status.usage + usage)
                self._land(job, index)
            case ItemRecorded(_, index, _, _):
                job.status = replace(status, counts=replace(counts, failed=counts.failed + 1))
                self._land(job, index)
            case ItemInterrupted():
                job.status = replace(status, counts=replace(counts, interrupted=counts.interrupted + 1))
        effects.append(Changed(write.job_id))
        self._end_if_done(now, job, effects)

    def _land(self, job: _Job, index: int) -> None:
        del job.flights[index]
        self._in_flight -= 1

    def _decide(self, now: float, job: _Job, state: JobState, effects: list[Effect]) -> None:
        job.decided = state
        effects.append(Persist(StateChanged(job.status.job_id, state, now)))

    def _end_if_done(self, now: float, job: _Job, effects: list[Effect]) -> None:
        if job.pending or job.flights or job.decided.ended:
            return
        cancelled = job.decided is JobState.CANCELLING
        counts = job.status.counts
        assert cancelled or counts.succeeded + counts.failed == counts.total, f"{job.status} ends with items left"
        self._decide(now, job, JobState.CANCELLED if cancelled else JobState.SUCCEEDED, effects)

    def _retry(self, now: float, effects: list[Effect]) -> None:
        later = math.inf
        for job in self._jobs.values():
            for index, flight in job.flights.items():
                if flight.phase is _Phase.WAITING and flight.due_unix_s <= now:
                    flight.phase = _Phase.RUNNING
                    effects.append(StartItem(job.status.job_id, index))
                elif flight.phase is _Phase.WAITING:
                    later = min(later, flight.due_unix_s)
        self._due_unix_s = math.inf
        self._wake_by(later, effects)

    def _wake_by(self, unix_s: float, effects: list[Effect]) -> None:
        if unix_s < self._due_unix_s:
            self._due_unix_s = unix_s
            effects.append(Wake(unix_s))

    def _fill_window(self, now: float, effects: list[Effect]) -> None:
        while self._turns and self._in_flight < self._config.window_items:
            job = self._turns.popleft()
            index = job.pending.popleft()
            if job.pending:
                self._turns.append(job)
            if job.decided is JobState.QUEUED:
                self._decide(now, job, JobState.RUNNING, effects)
            job.flights[index] = _Flight()
            self._in_flight += 1
            effects.append(StartItem(job.status.job_id, index))
