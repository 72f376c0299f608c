"""The job runner: every item gets one result, whatever fails, is cancelled or is started anew."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
from coordinator.jobs.runner import (
    JobConfig,
    JobRunner,
    backoff_s,
    item_request_id,
    item_sampling,
    item_seed,
    parse_item_request_id,
)
from echelon.errors import (
    CancelledError,
    DeadlineError,
    EchelonError,
    InvalidRequestError,
    OverloadedError,
    UnavailableError,
)
from echelon.sampling import SamplingParams
from echelon.types import Choice, Completion, FinishReason, ItemCounts, JobState, JobStatus, Usage

ANSWER = Completion(
    request_id="r",
    model="m",
    choices=(Choice(text="t", token_ids=(1, 2), finish_reason=FinishReason.STOP),),
    usage=Usage(3, 2, 1),
)


def stored(job_id: str = "a", total: int = 4, **keys: object) -> StoredJob:
    state = keys.pop("state", JobState.QUEUED)
    assert isinstance(state, JobState)
    status = JobStatus(
        job_id=job_id, state=state, model="m", counts=ItemCounts(total), usage=Usage(), create_unix_s=1.0
    )
    return replace(StoredJob(status=status), **keys)  # type: ignore[arg-type]


class World:
    """A runner, the items it has started, and the writes that wait for the disk."""

    def __init__(self, window_items: int = 100) -> None:
        self.config = JobConfig(window_items=window_items, first_backoff_s=1.0, max_backoff_s=8.0)
        self.restart()

    def restart(self) -> None:
        self.runner = JobRunner(self.config)
        self.now = 10.0
        self.running: list[tuple[str, int]] = []
        self.cancels: list[tuple[str, int]] = []
        self.writes: list[Write] = []
        self.wake: float | None = None

    def tell(self, event: Event) -> list[Effect]:
        effects = self.runner.step(self.now, event)
        for effect in effects:
            match effect:
                case StartItem(job_id, index):
                    assert (job_id, index) not in self.running
                    self.running.append((job_id, index))
                case CancelItem(job_id, index):
                    self.cancels.append((job_id, index))
                case Persist(write):
                    self.writes.append(write)
                case Wake(unix_s):
                    self.wake = unix_s
        return effects

    def end(self, job_id: str, index: int, outcome: Outcome = ANSWER) -> list[Effect]:
        self.running.remove((job_id, index))
        return self.tell(ItemEnded(job_id, index, outcome))

    def commit(self, count: int | None = None) -> list[Write]:
        batch = tuple(self.writes[:count])
        del self.writes[: len(batch)]
        self.tell(Committed(batch))
        return list(batch)

    def status(self, job_id: str = "a") -> JobStatus:
        status = self.runner.status(job_id)
        assert status is not None
        return status

    def records(self, writes: Iterable[Write]) -> list[tuple[int, int]]:
        return [(write.index, write.cursor) for write in writes if isinstance(write, ItemRecorded)]


def test_a_job_runs_its_items_in_order_and_succeeds() -> None:
    world = World()
    world.tell(Loaded((stored(total=3),)))
    assert world.running == [("a", 0), ("a", 1), ("a", 2)]
    assert world.commit() == [StateChanged("a", JobState.RUNNING, 10.0)]
    world.now = 12.0
    for index in (2, 0, 1):
        world.end("a", index, InvalidRequestError("too long") if index == 0 else ANSWER)
    assert world.records(world.commit()) == [(2, 1), (0, 2), (1, 3)]
    assert world.status().state is JobState.RUNNING
    assert world.commit() == [StateChanged("a", JobState.SUCCEEDED, 12.0)]
    status = world.status()
    assert (status.state, status.counts) == (JobState.SUCCEEDED, ItemCounts(3, succeeded=2, failed=1))
    assert status.usage == Usage(6, 4, 2)
    assert (status.start_unix_s, status.end_unix_s) == (10.0, 12.0)


def test_nothing_is_shown_before_it_is_on_disk() -> None:
    world = World()
    world.tell(Loaded((stored(total=1),)))
    assert world.status().state is JobState.QUEUED
    world.commit()
    world.end("a", 0)
    world.tell(Interrupted("a", 0))
    assert world.status().counts == ItemCounts(1, running=1)
    effects = world.runner.step(world.now, Committed(tuple(world.writes)))
    assert Changed("a") in effects
    assert world.status().counts == ItemCounts(1, succeeded=1, interrupted=1)


def test_the_window_bounds_what_runs_and_jobs_take_turns() -> None:
    world = World(window_items=3)
    world.tell(Loaded((stored("a", 9),)))
    world.tell(Loaded((stored("b", 2),)))
    assert world.running == [("a", 0), ("a", 1), ("a", 2)]
    for index in range(3):
        world.end("a", index)
        assert len(world.running) == 2 - index, "a result holds its place until it is on disk"
    world.commit()
    assert world.running == [("a", 3), ("b", 0), ("a", 4)]
    assert world.status("b").counts.running == 1


@pytest.mark.parametrize("error", [UnavailableError("no replica"), OverloadedError("queue full")])
def test_refusals_are_retried_with_back_off_and_hold_their_place(error: EchelonError) -> None:
    world = World(window_items=2)
    world.tell(Loaded((stored(total=3),)))
    for wait_s in (1.0, 2.0, 4.0, 8.0, 8.0):
        world.end("a", 0, error)
        assert world.wake == world.now + wait_s
        assert world.running == [("a", 1)], "the place in the window is kept"
        world.now = world.wake - 0.5
        world.tell(Tick())
        assert world.running == [("a", 1)]
        world.now = world.wake
        world.tell(Tick())
        assert world.running == [("a", 1), ("a", 0)]
    world.end("a", 0)
    assert world.records(world.commit()) == [(0, 1)]
    assert world.running == [("a", 1), ("a", 2)]


def test_retries_due_at_different_times_each_wake_the_runner() -> None:
    world = World()
    world.tell(Loaded((stored(total=2),)))
    world.end("a", 0, UnavailableError("x", retry_after_s=5.0))
    assert world.wake == 15.0
    world.end("a", 1, UnavailableError("x"))
    assert world.wake == 11.0
    world.now = 11.0
    world.tell(Tick())
    assert world.running == [("a", 1)] and world.wake == 15.0
    world.now = 15.0
    world.tell(Tick())
    assert world.running == [("a", 1), ("a", 0)]


def test_back_off_doubles_to_its_maximum_and_honours_the_server() -> None:
    config = JobConfig(first_backoff_s=0.5, max_backoff_s=30.0)
    assert [backoff_s(n, UnavailableError("x"), config) for n in (1, 2, 6, 7, 5000)] == [0.5, 1.0, 16.0, 30.0, 30.0]
    assert backoff_s(1, OverloadedError("x", retry_after_s=45.0), config) == 45.0


@pytest.mark.parametrize("error", [DeadlineError("late"), CancelledError("by hand"), InvalidRequestError("bad")])
def test_other_errors_are_the_items_result_at_once(error: EchelonError) -> None:
    world = World()
    world.tell(Loaded((stored(total=1),)))
    world.end("a", 0, error)
    assert ItemRecorded("a", 0, 1, error) in world.commit()
    assert world.commit() == [StateChanged("a", JobState.SUCCEEDED, 10.0)]


def test_a_job_is_taken_up_where_the_store_left_it() -> None:
    world = World()
    job = stored(total=4, state=JobState.RUNNING, done=frozenset({0, 2}), last_cursor=7)
    job = replace(job, status=replace(job.status, counts=ItemCounts(4, succeeded=2), start_unix_s=3.0))
    world.tell(Loaded((job,)))
    assert world.running == [("a", 1), ("a", 3)] and not world.writes
    world.end("a", 3)
    world.end("a", 1)
    assert world.records(world.commit()) == [(3, 8), (1, 9)]
    world.commit()
    assert world.status().counts == ItemCounts(4, succeeded=4) and world.status().start_unix_s == 3.0


def test_a_job_whose_last_result_was_stored_but_not_its_end_ends_at_start() -> None:
    world = World()
    job = stored(total=1, state=JobState.RUNNING, done=frozenset({0}), last_cursor=1)
    world.tell(Loaded((replace(job, status=replace(job.status, counts=ItemCounts(1, failed=1))),)))
    assert world.commit() == [StateChanged("a", JobState.SUCCEEDED, 10.0)]


def test_cancelling_ends_running_items_keeps_results_and_starts_nothing_more() -> None:
    world = World(window_items=4)
    world.tell(Loaded((stored(total=9),)))
    world.end("a", 0)
    world.end("a", 1, UnavailableError("retry later"))
    world.commit()  # 0 is on disk and 4 has started
    world.end("a", 2)  # on its way to the disk
    world.tell(CancelRequested("a"))
    assert world.cancels == []
    world.end("a", 3, UnavailableError("retry later"))
    world.commit()
    assert world.status().state is JobState.CANCELLING
    assert world.cancels == [("a", 4)]
    world.end("a", 4)  # answered just before the cancel arrived: kept
    world.commit()
    assert world.commit() == [StateChanged("a", JobState.CANCELLED, 10.0)]
    assert world.status().counts == ItemCounts(9, succeeded=3)
    world.now = 1000.0
    world.tell(Tick())
    assert world.running == []


@pytest.mark.parametrize("error", [CancelledError("x"), UnavailableError("x")])
def test_a_cancelled_item_leaves_no_result_and_is_not_retried(error: EchelonError) -> None:
    world = World()
    world.tell(Loaded((stored(total=1),)))
    world.tell(CancelRequested("a"))
    world.commit()
    world.end("a", 0, error)
    assert world.records(world.commit()) == []
    assert world.status().state is JobState.CANCELLED


def test_no_item_is_cancelled_before_the_cancel_is_on_disk() -> None:
    """A successor that knows nothing of the cancel would find the item's request cancelled, and record that."""
    world = World()
    world.tell(Loaded((stored(total=1),)))
    world.tell(CancelRequested("a"))
    world.commit(1)  # RUNNING alone
    assert world.cancels == []
    world.commit()
    assert world.cancels == [("a", 0)]


def test_cancelling_twice_or_after_the_end_changes_nothing() -> None:
    world = World()
    world.tell(Loaded((stored("a", 1), stored("b", 1))))
    world.tell(CancelRequested("a"))
    assert world.tell(CancelRequested("a")) == []
    world.end("b", 0)
    world.commit()  # SUCCEEDED is decided now, though not on disk
    assert world.tell(CancelRequested("b")) == []
    world.commit()
    assert world.status("b").state is JobState.SUCCEEDED


def test_a_job_that_was_cancelling_at_a_crash_ends_cancelled_and_its_items_are_cancelled_again() -> None:
    world = World()
    world.tell(Loaded((stored(total=3, state=JobState.CANCELLING, done=frozenset({1})),)))
    assert world.cancels == [("a", 0), ("a", 2)] and world.running == []
    assert world.commit() == [StateChanged("a", JobState.CANCELLED, 10.0)]


def test_an_interruption_is_counted_once_per_running_item() -> None:
    world = World()
    world.tell(Loaded((stored(total=2, interrupted=frozenset({1})),)))
    for item in (("a", 0), ("a", 0), ("a", 1), ("a", 9), ("nobody", 0)):
        world.tell(Interrupted(*item))
    assert [write for write in world.writes if isinstance(write, ItemInterrupted)] == [ItemInterrupted("a", 0)]


def test_a_known_job_is_not_loaded_twice() -> None:
    world = World()
    world.tell(Loaded((stored(total=2),)))
    assert world.tell(Loaded((stored(total=2),))) == []


def test_an_item_is_named_and_seeded_by_its_place() -> None:
    assert item_request_id("n.1", 7) == "job.n.1.7"
    assert parse_item_request_id("job.n.1.7") == ("n.1", 7)
    for other in ("n.1.7", "job.7", "job..7", "job.n.x", "jobs.n.7", "", "job"):
        assert parse_item_request_id(other) is None
    seeds = {item_seed(job_id, index) for job_id in ("a", "b") for index in range(100)}
    assert len(seeds) == 200 and item_seed("a", 0) == item_seed("a", 0)
    drawn = item_sampling(SamplingParams(top_k=3), "a", 5)
    assert drawn == SamplingParams(top_k=3, seed=item_seed("a", 5))
    assert item_sampling(SamplingParams(seed=0), "a", 5).seed == 0


OUTCOMES: tuple[Outcome, ...] = (ANSWER, InvalidRequestError("bad"), UnavailableError("later"), DeadlineError("late"))


@settings(max_examples=300, deadline=None)
@given(data=st.data(), total=st.integers(1, 6), window=st.integers(1, 4), cancels=st.booleans())
def test_every_item_has_at_most_one_result_and_every_job_ends(
    data: st.DataObject, total: int, window: int, cancels: bool
) -> None:
    """Any order of ends, commits, crashes and a cancel; the disk is replayed into a new runner at each crash."""
    disk = stored(total=total)
    world = World(window)
    world.tell(Loaded((disk,)))
    steps = data.draw(st.lists(st.sampled_from(["end", "commit", "crash", "cancel", "wait"]), max_size=30))
    for step in [*steps, *["end", "wait", "commit"] * (3 * total)]:
        if step == "end" and world.running:
            item = data.draw(st.sampled_from(world.running))
            world.end(
                *item, outcome=CancelledError("x") if item in world.cancels else data.draw(st.sampled_from(OUTCOMES))
            )
        elif step == "commit":
            disk = write_through(disk, world.commit(data.draw(st.integers(0, 3))))
        elif step == "crash":
            world.restart()
            world.tell(Loaded((disk,)))
        elif step == "cancel" and cancels:
            world.tell(CancelRequested("a"))
        elif step == "wait":
            world.now += 100.0
            world.tell(Tick())
        assert len(world.running) <= window
    while world.running or world.writes:
        for item in list(world.running):
            world.end(*item)
        disk = write_through(disk, world.commit())
    finished = disk.status.counts.succeeded + disk.status.counts.failed
    assert disk.status.state.ended and world.status() == disk.status
    assert disk.status.state is JobState.CANCELLED or finished == total
    assert disk.last_cursor == finished == len(disk.done)


def write_through(disk: StoredJob, writes: Iterable[Write]) -> StoredJob:
    """What the store does, with its rules as assertions."""
    for write in writes:
        status, counts = disk.status, disk.status.counts
        assert not status.state.ended, f"{write} after the end"
        match write:
            case StateChanged(_, state, unix_s):
                start = unix_s if state is JobState.RUNNING else status.start_unix_s
                end = unix_s if state.ended else None
                disk = replace(disk, status=replace(status, state=state, start_unix_s=start, end_unix_s=end))
            case ItemRecorded(_, index, cursor, outcome):
                assert index not in disk.done and cursor == disk.last_cursor + 1
                disk = replace(disk, done=disk.done | {index}, last_cursor=cursor)
                if isinstance(outcome, Completion):
                    usage = outcome.usage
                    total = [getattr(status.usage, name) + getattr(usage, name) for name in Usage.__slots__]
                    counts = replace(counts, succeeded=counts.succeeded + 1)
                    disk = replace(disk, status=replace(status, counts=counts, usage=Usage(*total)))
                else:
                    counts = replace(counts, failed=counts.failed + 1)
                    disk = replace(disk, status=replace(status, counts=counts))
    return disk
