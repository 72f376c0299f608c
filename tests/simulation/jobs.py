"""Simulated batch jobs: the real JobRunner in the coordinator, a durable table, and users who submit.

Like `coordinator/jobs/{service,store}.py`: items run as streams of the core, writes gather while one
commit is on its way, and a crash loses what had not arrived. The table is the judge: it refuses a second result, an
outcome that the model did not give, and whatever is shown before it is durable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from coordinator.jobs import events
from coordinator.jobs.runner import JobConfig, JobRunner, item_request_id, parse_item_request_id
from coordinator.requests.events import Cancel, StreamClosed
from coordinator.requests.nouns import Request, Shown
from echelon.errors import CancelledError, InvalidRequestError
from echelon.types import Completion, ItemCounts, JobState, JobStatus, Usage
from tests.simulation.checker import require
from tests.simulation.model import BREAKS, FINISHES, Reference
from tests.simulation.world import World

if TYPE_CHECKING:
    from tests.simulation.coordinator import Coordinator
    from tests.simulation.supervisor import Supervisor

ITEM_TIMEOUT_S = 86_400.0
COMMIT_FAILS = 0.05  # how often
STORE_RETRY_S = 1.0


@dataclass(frozen=True, slots=True)
class Item:
    """One line of a batch, as it is asked for. fits: some replica could hold it."""

    request: Request
    fits: bool


@dataclass(frozen=True, slots=True)
class JobOrder:
    """What one user submits, and when it is taken back, if ever."""

    job_id: str
    items: tuple[Item, ...]
    starts_s: float
    cancels_s: float | None


@dataclass(slots=True)
class Row:
    """A job on disk."""

    items: tuple[Item, ...]
    status: JobStatus
    results: dict[int, events.Outcome] = field(default_factory=dict)
    interrupted: set[int] = field(default_factory=set)

    def stored(self) -> events.StoredJob:
        done = () if self.status.state.ended else self.results
        return events.StoredJob(
            status=self.shown(),
            done=frozenset(done),
            interrupted=frozenset(self.interrupted),
            last_cursor=len(self.results),
        )

    def shown(self) -> JobStatus:
        """What may be shown of it: what is here and nothing else."""
        answers = [outcome for outcome in self.results.values() if isinstance(outcome, Completion)]
        failed = len(self.results) - len(answers)
        counts = ItemCounts(len(self.items), len(answers), failed, 0, len(self.interrupted))
        usage = sum((answer.usage for answer in answers), Usage())
        return replace(self.status, counts=counts, usage=usage)


class JobTable:
    """Every job, durably."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}

    def create(self, order: JobOrder, now: float) -> events.StoredJob:
        if order.job_id not in self.rows:
            status = JobStatus(
                job_id=order.job_id,
                state=JobState.QUEUED,
                model="m",
                counts=ItemCounts(),
                usage=Usage(),
                create_unix_s=now,
            )
            self.rows[order.job_id] = Row(order.items, status)
        return self.rows[order.job_id].stored()

    def load(self) -> tuple[events.StoredJob, ...]:
        return tuple(row.stored() for row in self.rows.values())

    def commit(self, writes: tuple[events.Write, ...]) -> None:
        for write in writes:
            row = self.rows[write.job_id]
            require(not row.status.state.ended, "{} is written after the job's end", write)
            match write:
                case events.StateChanged(_, state, unix_s):
                    self._change(row, state, unix_s)
                case events.ItemRecorded(_, index, cursor, outcome):
                    require(index not in row.results, "item {} has a result already", write)
                    require(cursor == len(row.results) + 1, "{} after {} results", write, len(row.results))
                    _check_outcome(row.items[index], outcome)
                    row.results[index] = outcome
                case events.ItemInterrupted(_, index):
                    require(index not in row.interrupted, "{} was counted already", write)
                    row.interrupted.add(index)

    def _change(self, row: Row, state: JobState, unix_s: float) -> None:
        allowed = {
            JobState.QUEUED: (JobState.RUNNING, JobState.CANCELLING),
            JobState.RUNNING: (JobState.SUCCEEDED, JobState.CANCELLING),
            JobState.CANCELLING: (JobState.CANCELLED,),
        }[row.status.state]
        require(state in allowed, "{} after {}", state, row.status.state)
        whole = len(row.results) == len(row.items)
        require(whole or state is not JobState.SUCCEEDED, "a job ends with {} results", len(row.results))
        started = unix_s if state is JobState.RUNNING else row.status.start_unix_s
        ended = unix_s if state.ended else row.status.end_unix_s
        row.status = replace(row.status, state=state, start_unix_s=started, end_unix_s=ended)


def _check_outcome(item: Item, outcome: events.Outcome) -> None:
    if not isinstance(outcome, Completion):
        refused = isinstance(outcome, InvalidRequestError)
        reason = not item.fits or item.request.sampling.grammar == BREAKS
        require(refused and reason, "{} ended in {!r}", item, outcome)
        return
    request, counts = item.request, 0
    require(len(outcome.choices) == request.sampling.n, "{} is not an answer to {}", outcome, item)
    for choice in outcome.choices:
        answer = Reference(request, choice.index)
        for token_id in choice.token_ids:
            defect = answer.push(token_id, None)
            require(not defect, "{}: {}", item, defect)
        ending = answer.ending
        require(ending is not None, "{} is not the whole answer to {}", choice, item)
        assert ending is not None
        require(choice.text == ending.text, "{!r} is not the text {!r}", choice.text, ending.text)
        require(choice.finish_reason is FINISHES[ending.finish], "{} ended in {}", choice, ending)
        counts += len(choice.token_ids)
    usage = outcome.usage
    counted = usage.prompt_tokens, usage.completion_tokens
    require(counted == (len(request.prompt), counts), "{} of {}", usage, outcome)


class Jobs:
    """The jobs of one coordinator. To be called within its `act`."""

    def __init__(self, coordinator: Coordinator, table: JobTable, config: JobConfig) -> None:
        self._coordinator = coordinator
        self._table = table
        self._window_items = config.window_items
        self._runner = JobRunner(config)
        self._streams: dict[tuple[str, int], int | None] = {}  # of started items; None until submitted
        self._unwritten: list[events.Write] = []
        self._writing = False
        self._commit_s = coordinator.world.random.choice((0.001, 0.05, 0.5))

    def load(self) -> None:
        self._apply(events.Loaded(self._table.load()))

    def create(self, order: JobOrder, acknowledge: Callable[[], None]) -> None:
        self._coordinator.disk.check_owner(self._coordinator.term)
        if self._coordinator.disk.full:
            return
        stored = self._table.create(order, self._coordinator.world.clock.now)
        self._coordinator.maybe_crash()
        self._apply(events.Loaded((stored,)))
        acknowledge()

    def cancel(self, job_id: str) -> None:
        if self._runner.status(job_id):
            self._apply(events.CancelRequested(job_id))

    def interrupted(self, request_id: str) -> None:
        if item := parse_item_request_id(request_id):
            self._apply(events.Interrupted(*item))

    def _apply(self, event: events.Event) -> None:
        for effect in self._runner.step(self._coordinator.world.clock.now, event):
            self._coordinator.maybe_crash()
            match effect:
                case events.StartItem(job_id, index):
                    self._streams[job_id, index] = None
                    self._soon(self._submit, (job_id, index))
                case events.CancelItem(job_id, index) if (job_id, index) in self._streams:
                    self._soon(self._cancel_item, (job_id, index), self._streams.pop((job_id, index)))
                case events.CancelItem(job_id, index):
                    self._coordinator.post(Cancel((item_request_id(job_id, index),)))
                case events.Persist(write):
                    self._unwritten.append(write)
                    if not self._writing:
                        self._writing = True
                        self._coordinator.after(self._commit_s, self._write)
                case events.Wake(unix_s):
                    self._coordinator.after(unix_s - self._coordinator.world.clock.now, self._apply, events.Tick())
        self._check_shown()

    def _check_shown(self) -> None:
        """After every step, every job is shown as it stands on disk."""
        if self._coordinator.superseded:  # it is about to find out
            return
        running = 0
        for shown in self._runner.statuses():
            counts = shown.counts
            running += counts.running
            require(counts.succeeded + counts.failed + counts.running <= counts.total, "{} do not add up", counts)
            durable = self._table.rows[shown.job_id].shown()
            shown = replace(shown, counts=replace(counts, running=0))
            require(shown == durable, "{} is shown, {} is on disk", shown, durable)
        require(running <= self._window_items, "{} items in flight", running)

    def _submit(self, item: tuple[str, int]) -> None:
        if item not in self._streams:  # cancelled meanwhile
            return
        now = self._coordinator.world.clock.now
        asked = self._table.rows[item[0]].items[item[1]].request
        request = replace(asked, deadline_unix_s=now + ITEM_TIMEOUT_S, opened_unix_s=now)
        self._streams[item] = self._coordinator.open_stream(request, None, lambda event: self._take(item, event))

    def _take(self, item: tuple[str, int], event: Shown) -> None:
        if isinstance(event, events.Outcome):
            self._soon(self._end, item, event)

    def _end(self, item: tuple[str, int], outcome: events.Outcome) -> None:
        if item in self._streams:
            del self._streams[item]
            self._apply(events.ItemEnded(*item, outcome))

    def _cancel_item(self, item: tuple[str, int], stream: int | None) -> None:
        """First the stream, so that nothing submits the request after it was cancelled."""
        if stream is not None:
            self._coordinator.post(StreamClosed(stream))
        self._coordinator.post(Cancel((item_request_id(*item),)))
        self._apply(events.ItemEnded(*item, CancelledError("the job was cancelled")))

    def _write(self) -> None:
        """Group commit: all that has gathered, in one transaction."""
        self._coordinator.disk.check_owner(self._coordinator.term)
        if self._coordinator.disk.full or self._coordinator.world.random.random() < COMMIT_FAILS:
            self._coordinator.after(STORE_RETRY_S, self._write)
            return
        batch = tuple(self._unwritten)
        self._table.commit(batch)
        self._coordinator.maybe_crash()
        self._unwritten.clear()
        self._writing = False
        self._apply(events.Committed(batch))

    def _soon(self, action: Callable[..., None], *arguments: object) -> None:
        self._coordinator.after(self._coordinator.world.random.random() * 0.02, action, *arguments)


class JobUser:
    """Submits a job until it is acknowledged, and may cancel it later."""

    def __init__(self, world: World, supervisor: Supervisor, order: JobOrder) -> None:
        self.order = order
        self._world = world
        self._supervisor = supervisor
        self._acknowledged = False
        self._submit()
        if order.cancels_s is not None:
            world.clock.after(order.cancels_s, self._cancel)

    @property
    def state(self) -> JobState | None:
        row = self._supervisor.disk.jobs.rows.get(self.order.job_id)
        return row.status.state if row else None

    @property
    def ended(self) -> bool:
        return self.state is not None and self.state.ended

    def check(self) -> None:
        """How it must stand, once every fault is over."""
        require(self.ended, "{} is {}", self.order.job_id, self.state)
        may_cancel = self.order.cancels_s is not None
        require(may_cancel or self.state is JobState.SUCCEEDED, "{} is {}", self.order, self.state)

    def _submit(self) -> None:
        """Again until it is acknowledged, and sometimes once more."""
        if not self._acknowledged or self._world.random.random() < 0.2:
            self._supervisor.call(lambda coordinator: coordinator.jobs.create(self.order, self._acknowledge))
            self._world.clock.after(1.0, self._submit)

    def _acknowledge(self) -> None:
        self._acknowledged = True

    def _cancel(self) -> None:
        if self.state in (None, JobState.QUEUED, JobState.RUNNING):
            self._supervisor.call(lambda coordinator: coordinator.jobs.cancel(self.order.job_id))
            self._world.clock.after(0.5, self._cancel)
