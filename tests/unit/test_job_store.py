"""The job store: what it keeps, what it refuses, and that a process may end at any point of a write."""

from __future__ import annotations

import math
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy.exc import IntegrityError

from coordinator.jobs import codec as job_codec
from coordinator.jobs.events import ItemInterrupted, ItemRecorded, StateChanged
from coordinator.jobs.store import CRASH_POINTS, JobStore, NewItem, NewJob
from echelon.errors import ConfigError, ConflictError, OverloadedError, UnavailableError
from echelon.types import Choice, Completion, FinishReason, ItemCounts, JobState, Timing, TokenLogprob, Usage

ANSWER = Completion(
    request_id="job.a.0",
    model="m",
    choices=(
        Choice(
            text="fuchs 狐 \U0001f98a",
            token_ids=(1, 2),
            finish_reason=FinishReason.LENGTH,
            logprobs=(TokenLogprob(1, -0.1, ((1, -0.1), (5, -2.5))), TokenLogprob(2, -math.inf)),
        ),
        Choice(index=1, text="x", token_ids=(3,), finish_reason=FinishReason.STOP, matched_stop="."),
    ),
    usage=Usage(3, 3, 1, 2),
    timing=Timing(0.1, 0.2, 0.3),
    prompt_logprobs=(TokenLogprob(7, -1.5), TokenLogprob(8, -0.5, ((9, -0.25),))),
)
ERROR = OverloadedError("full", field="f", request_id="job.a.1")


def new_job(job_id: str = "a", items: int = 3, digest: bytes = b"d") -> NewJob:
    lines = tuple(NewItem(f"c{index}", f'{{"line": {index}}}') for index in range(items))
    return NewJob(job_id=job_id, digest=digest, model="m", items=lines, create_unix_s=5.0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "jobs.db"


@pytest.fixture
def store(path: Path) -> Iterator[JobStore]:
    store = JobStore(path)
    yield store
    store.close()


def test_opening_a_store_again_writes_nothing(tmp_path: Path) -> None:
    """A coordinator must be able to start on a disk that has become full."""
    path = tmp_path / "jobs.db"
    JobStore(path).close()
    written_ns = path.stat().st_mtime_ns
    again = JobStore(path)
    assert again.load() == ()
    logs = [each.stat().st_size for each in tmp_path.glob("*-wal")]
    again.close()
    assert sum(logs) == 0 and path.stat().st_mtime_ns == written_ns


def test_all_of_a_job_is_found_again(store: JobStore, path: Path) -> None:
    store.create(new_job("a"))
    store.create(new_job("b", items=1))
    store.commit([StateChanged("a", JobState.RUNNING, 6.0), ItemRecorded("a", 2, 1, ANSWER), ItemInterrupted("a", 0)])
    store.commit([ItemRecorded("a", 0, 2, ERROR), StateChanged("b", JobState.CANCELLED, 8.0)])
    store.close()
    reopened = JobStore(path)
    first, second = reopened.load()
    assert first.status.counts == ItemCounts(3, succeeded=1, failed=1, interrupted=1)
    assert (first.status.state, first.status.usage) == (JobState.RUNNING, Usage(3, 3, 1, 2))
    assert (first.status.create_unix_s, first.status.start_unix_s, first.status.end_unix_s) == (5.0, 6.0, None)
    assert (first.done, first.interrupted, first.last_cursor) == (frozenset({0, 2}), frozenset({0}), 2)
    assert (second.status.job_id, second.status.state, second.status.end_unix_s) == ("b", JobState.CANCELLED, 8.0)
    assert reopened.item_line("a", 1) == '{"line": 1}'
    reopened.close()


def test_results_are_read_by_cursor_with_every_detail(store: JobStore) -> None:
    store.create(new_job())
    store.commit([ItemRecorded("a", 2, 1, ANSWER), ItemRecorded("a", 0, 2, ERROR)])
    completed, failed = store.results("a", 0, 10)
    assert (completed.custom_id, completed.index, completed.cursor) == ("c2", 2, 1)
    assert completed.completion == ANSWER and completed.error is None
    assert isinstance(failed.error, OverloadedError) and failed.completion is None
    assert (failed.error.message, failed.error.reason, failed.error.field) == ("full", "QUEUE_FULL", "f")
    assert failed.error.request_id == "job.a.1"
    assert [result.cursor for result in store.results("a", 1, 10)] == [2]
    assert [result.cursor for result in store.results("a", 0, 1)] == [1]
    assert store.results("other", 0, 10) == ()
    assert store.results("a", 2**64 - 1, 10) == (), "a cursor that a message can carry, and the database cannot"


def test_the_same_content_under_an_id_is_the_same_job_and_other_content_a_conflict(store: JobStore) -> None:
    store.create(new_job())
    store.commit([ItemRecorded("a", 0, 1, ANSWER)])
    assert store.create(new_job()).done == {0}
    with pytest.raises(ConflictError, match="job 'a' exists with other content") as caught:
        store.create(new_job(digest=b"e"))
    assert caught.value.reason == "JOB_ID_CONFLICT"
    assert len(store.load()) == 1


@pytest.mark.parametrize("again", [ItemRecorded("a", 0, 2, ANSWER), ItemRecorded("a", 1, 1, ANSWER)])
def test_a_second_result_of_an_item_or_a_cursor_is_impossible(store: JobStore, again: ItemRecorded) -> None:
    store.create(new_job())
    store.commit([ItemRecorded("a", 0, 1, ANSWER)])
    with pytest.raises(IntegrityError):
        store.commit([StateChanged("a", JobState.SUCCEEDED, 9.0), again])
    (job,) = store.load()
    assert (job.status.state, job.done) == (JobState.QUEUED, frozenset({0})), "the whole batch is taken back"


def test_a_second_coordinator_is_shut_out(store: JobStore, path: Path) -> None:
    with pytest.raises(ConfigError, match=r"jobs\.db cannot be opened: database is locked"):
        JobStore(path)


def test_another_schema_is_refused(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version=99")
    connection.close()
    with pytest.raises(ConfigError, match="schema 99, this Echelon reads 2; give another state-dir"):
        JobStore(path)


def test_a_full_disk_is_told_and_leaves_the_store_usable(store: JobStore) -> None:
    store.create(new_job(items=1))
    pages = store._connection.exec_driver_sql("PRAGMA page_count").scalar_one()
    store._connection.exec_driver_sql(f"PRAGMA max_page_count={pages}").close()
    store._connection.rollback()
    with pytest.raises(OverloadedError, match="database or disk is full") as caught:
        store.create(new_job("b", items=5000))
    assert caught.value.reason == "JOURNAL_UNAVAILABLE"
    assert [job.status.job_id for job in store.load()] == ["a"]


def test_commits_reach_the_disk_before_they_return(store: JobStore) -> None:
    def pragma(name: str) -> object:
        value = store._connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
        store._connection.rollback()
        return value

    full = 2
    assert (pragma("journal_mode"), pragma("synchronous"), pragma("locking_mode")) == ("wal", full, "exclusive")


def test_errors_keep_their_kind_through_json() -> None:
    error = job_codec.error(job_codec.dump(UnavailableError("gone", reason="DRAINING")))
    assert isinstance(error, UnavailableError) and error.reason == "DRAINING"


@pytest.fixture(scope="module")
def crasher() -> Iterator[subprocess.Popen[str]]:
    child = Path(__file__).with_name("job_crash_child.py")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, child], text=True, bufsize=1, **pipes) as process:  # type: ignore[call-overload]
        yield process
        process.stdin.close()
        assert process.wait(timeout=60) == 0


@pytest.mark.parametrize("point", CRASH_POINTS)
def test_a_process_may_end_at_any_point(crasher: subprocess.Popen[str], path: Path, point: str) -> None:
    """A process runs a whole job and ends itself at the point, each time a little later, until it gets to its end.

    What it was told is durable must be there afterwards, and what it saw of the results must never change.
    """
    acknowledged, seen = False, list[str]()
    for times in range(1, 20):
        ended, told = run_until(crasher, path, point, times)
        acknowledged |= "created" in told
        results = [line for line in told if line.startswith("result:")]
        assert results[: len(seen)] == seen[: len(results)], "a result that was seen changed or went"
        seen = max(seen, results, key=len)
        store = JobStore(path)
        jobs, visible = store.load(), store.results("a", 0, 100)
        store.close()
        assert len(jobs) == 1 or (not acknowledged and not jobs)
        assert [result.cursor for result in visible] == list(range(1, len(visible) + 1))
        assert len({result.index for result in visible}) == len(visible) >= len(seen)
        if ended:
            break
    assert ended and times > 1, f"{point} was never met"
    assert (jobs[0].status.state, jobs[0].status.counts) == (JobState.SUCCEEDED, ItemCounts(4, succeeded=3, failed=1))
    assert [result.error is None for result in sorted(visible, key=lambda result: result.index)] == [True] * 3 + [False]


def run_until(crasher: subprocess.Popen[str], path: Path, point: str, times: int) -> tuple[bool, list[str]]:
    """Whether the process got to its end, and the lines that it told before."""
    assert crasher.stdin is not None and crasher.stdout is not None
    crasher.stdin.write(f"{path} {point} {times}\n")
    told: list[str] = []
    while not (line := crasher.stdout.readline().strip()).startswith("exit:"):
        assert line, "the process that starts them is gone"
        told.append(line)
    assert line in ("exit:0", "exit:77"), told
    return line == "exit:0", told
