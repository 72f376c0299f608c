"""The jobs' shell: items run like any client's streams, results and watchers, cancel, restart, a failing disk."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from coordinator.frontend import GenerateFields
from coordinator.jobs import service as job_service
from coordinator.jobs.events import CancelItem
from coordinator.jobs.runner import JobConfig, item_seed
from coordinator.jobs.service import JobService
from coordinator.requests.nouns import Shown
from echelon.errors import (
    CancelledError,
    ConflictError,
    DeadlineError,
    EchelonError,
    InternalError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
)
from echelon.sampling import SamplingParams
from echelon.types import Admitted, Choice, Completion, FinishReason, ItemCounts, ItemResult, JobState

Answer = Callable[[GenerateFields], Awaitable[Shown | None]]


class Generation:
    """Answers items by a function; a request that it does not answer waits until its stream is left."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.submitted: list[GenerateFields] = []
        self.left: list[str] = []
        self.clock_ahead_s = 0.0
        self.cancelled: list[str] = []
        self.cancelled_too_early: list[str] = []  # while a stream could still submit them

    async def submit(self, fields: GenerateFields) -> AsyncGenerator[Shown, None]:
        self.submitted.append(fields)
        try:
            yield Admitted(fields.request_id, 1, 0)
            event = await self.answer(fields)
            if event is not None:
                yield event
        except asyncio.CancelledError:
            self.left.append(fields.request_id)
            raise

    def cancel(self, request_ids: Sequence[str]) -> Sequence[str]:
        self.cancelled += request_ids
        self.cancelled_too_early += [each for each in request_ids if each not in self.left]
        return request_ids

    def now(self) -> float:
        return time.time() + self.clock_ahead_s


def completion(fields: GenerateFields) -> Completion:
    return Completion(
        request_id=fields.request_id,
        model=fields.model,
        choices=(Choice(text=f"<{fields.prompt}>", token_ids=(1,), finish_reason=FinishReason.STOP),),
    )


async def echo(fields: GenerateFields) -> Shown:
    return completion(fields)


async def never(fields: GenerateFields) -> Shown:
    await asyncio.Event().wait()
    raise AssertionError("never")


@asynccontextmanager
async def opened(path: Path, generation: Generation, config: JobConfig | None = None) -> AsyncIterator[JobService]:
    service = await JobService.open(path, generation, config or JobConfig(first_backoff_s=0.01))
    run = asyncio.create_task(service.run())
    try:
        yield service
    finally:
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)
        await service.close()


def jsonl(*prompts: str) -> bytes:
    return "\n".join(f'{{"custom_id": "c{n}", "prompt": "{prompt}"}}' for n, prompt in enumerate(prompts)).encode()


async def all_results(service: JobService, job_id: str = "a", follow: bool = True) -> list[ItemResult]:
    return [result async for result in service.results(job_id, 0, follow)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "jobs.db"


def test_an_items_place_in_the_queue_and_its_salt_go_with_it(path: Path) -> None:
    async def test() -> None:
        generation = Generation(echo)
        line = b'{"custom_id": "c9", "prompt": "x", "priority": -3, "cache_salt": "tenant", "n": 2, "stop": "."}'
        async with opened(path, generation) as service:
            await service.create("a", "tiny", jsonl("x") + b"\n" + line)
            await all_results(service)
        plain, special = sorted(generation.submitted, key=lambda fields: fields.request_id)
        assert (plain.priority, plain.cache_salt) == (0, "")
        assert (special.priority, special.cache_salt) == (-3, "tenant")
        assert (special.sampling.n, special.sampling.stop) == (2, (".",))

    asyncio.run(test())


@pytest.mark.parametrize("ahead_s", [3600.0, -3600.0])
def test_an_items_deadline_counts_by_the_clock_that_judges_it(path: Path, ahead_s: float) -> None:
    """Which is not the machine's once that was set."""

    async def test() -> None:
        generation = Generation(echo)
        generation.clock_ahead_s = ahead_s
        async with opened(path, generation) as service:
            await service.create("a", "m", jsonl("x"))
            await all_results(service)
        (fields,) = generation.submitted
        assert fields.deadline_unix_s is not None
        assert fields.deadline_unix_s - generation.now() == pytest.approx(job_service.ITEM_TIMEOUT_S, abs=60)

    asyncio.run(test())


def test_a_job_runs_to_its_end(path: Path) -> None:
    async def test() -> None:
        generation = Generation(echo)
        async with opened(path, generation, JobConfig(window_items=2)) as service:
            created = await service.create("a", "tiny", jsonl("x", "y", "z"))
            assert created.counts.total == 3
            results = await all_results(service)
            assert sorted((item.custom_id, item.index, item.text) for item in results) == [
                *(("c0", 0, "<x>"), ("c1", 1, "<y>"), ("c2", 2, "<z>"))
            ]
            assert [item.cursor for item in results] == [1, 2, 3]
            status = service.get("a")
            assert (status.state, status.counts) == (JobState.SUCCEEDED, ItemCounts(3, succeeded=3))
        fields = generation.submitted[1]
        assert (fields.request_id, fields.model, fields.sampling) == (
            *("job.a.1", "tiny"),
            SamplingParams(seed=item_seed("a", 1)),
        )
        assert fields.deadline_unix_s is not None

    asyncio.run(test())


def test_errors_are_results_and_refusals_are_tried_again(path: Path) -> None:
    tries: dict[str, int] = {}

    async def answer(fields: GenerateFields) -> Shown | None:
        prompt = str(fields.prompt)
        tries[prompt] = tries.get(prompt, 0) + 1
        errors: dict[str, EchelonError] = {"late": DeadlineError("too late"), "bad": InvalidRequestError("no")}
        if prompt == "defect":
            raise ZeroDivisionError
        if prompt == "bad":
            raise errors[prompt]
        if prompt == "late":
            return errors[prompt]
        if prompt == "busy" and tries[prompt] == 1:
            raise OverloadedError("full")
        if prompt == "away" and tries[prompt] == 1:
            return UnavailableError("no replica")
        return None if prompt == "cut" and tries[prompt] == 1 else completion(fields)

    async def test() -> None:
        async with opened(path, Generation(answer)) as service:
            await service.create("a", "tiny", jsonl("late", "bad", "defect", "busy", "away", "cut"))
            results = sorted(await all_results(service), key=lambda item: item.index)
            assert [type(item.error) for item in results[:3]] == [DeadlineError, InvalidRequestError, InternalError]
            assert [item.text for item in results[3:]] == ["<busy>", "<away>", "<cut>"]
            assert service.get("a").counts == ItemCounts(6, succeeded=3, failed=3)
            assert service.get("a").state is JobState.SUCCEEDED
        assert list(tries.values()) == [1, 1, 1, 2, 2, 2]

    asyncio.run(test())


def test_ids_conflicts_and_unknown_jobs(path: Path) -> None:
    async def test() -> None:
        async with opened(path, Generation(echo)) as service:
            many = await asyncio.gather(*(service.create("a", "tiny", jsonl("x")) for _ in range(20)))
            assert {status.job_id for status in many} == {"a"}
            for model, content in (("tiny", jsonl("y")), ("other", jsonl("x"))):
                with pytest.raises(ConflictError):
                    await service.create("a", model, content)
            with pytest.raises(InvalidRequestError, match="batch_job_id"):
                await service.create("a/b", "tiny", jsonl("x"))
            with pytest.raises(NotFoundError) as caught:
                service.get("b")
            assert caught.value.reason == "JOB_NOT_FOUND"
            drawn = [await service.create("", "tiny", jsonl("x")) for _ in range(2)]
            assert drawn[0].job_id != drawn[1].job_id
            assert len(await all_results(service, "a")) == 1

    asyncio.run(test())


def test_jobs_are_listed_in_pages_from_the_newest(path: Path) -> None:
    async def test() -> None:
        async with opened(path, Generation(echo)) as service:
            for name in "abcde":
                await service.create(name, "tiny", jsonl("x"))
            pages, token = list[str](), ""
            while True:
                page, token = service.list_jobs(2, token)
                pages.append("".join(status.job_id for status in page))
                if not token:
                    break
            assert pages == ["ed", "cb", "a"]
            assert len(service.list_jobs(0, "")[0]) == 5
            for size, wrong in ((-1, ""), (2, "zz")):
                with pytest.raises(InvalidRequestError):
                    service.list_jobs(size, wrong)

    asyncio.run(test())


def test_watchers_see_each_state_and_the_last_one(path: Path) -> None:
    async def test() -> None:
        gate = asyncio.Event()

        async def answer(fields: GenerateFields) -> Shown:
            await gate.wait()
            return await echo(fields)

        async with opened(path, Generation(answer), JobConfig(window_items=1)) as service:
            await service.create("a", "tiny", jsonl("x", "y"))
            seen = []
            async for status in service.watch("a"):
                seen.append((status.state, status.counts.succeeded))
                gate.set()
            assert seen[-1] == (JobState.SUCCEEDED, 2)
            assert (JobState.RUNNING, 1) in seen and seen == sorted(seen, key=lambda each: each[1])
            assert [status.state async for status in service.watch("a")] == [JobState.SUCCEEDED]

    asyncio.run(test())


def test_results_are_followed_or_only_those_so_far(path: Path) -> None:
    async def test() -> None:
        gate = asyncio.Event()

        async def answer(fields: GenerateFields) -> Shown:
            if fields.prompt == "slow":
                await gate.wait()
            return await echo(fields)

        async with opened(path, Generation(answer)) as service:
            await service.create("a", "tiny", jsonl("slow", "x"))
            stream = service.results("a", 0, follow=True)
            first = await anext(stream)
            assert (first.index, first.cursor) == (1, 1)
            assert [item.index for item in await all_results(service, follow=False)] == [1]
            gate.set()
            assert [item.index async for item in stream] == [0]
            assert [item.cursor async for item in service.results("a", 1, follow=True)] == [2]

    asyncio.run(test())


def test_more_results_than_one_read_takes_are_all_yielded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_service, "RESULTS_PER_READ", 2)

    async def test() -> None:
        async with opened(path, Generation(echo)) as service:
            await service.create("a", "tiny", jsonl(*"stuvwxyz"[:5]))
            assert [item.cursor for item in await all_results(service)] == [1, 2, 3, 4, 5]
            assert len(await all_results(service, follow=False)) == 5

    asyncio.run(test())


def test_cancel_leaves_the_streams_cancels_the_requests_and_keeps_results(path: Path) -> None:
    async def test() -> None:
        async def answer(fields: GenerateFields) -> Shown:
            return await (echo if fields.prompt == "x" else never)(fields)

        generation = Generation(answer)
        async with opened(path, generation, JobConfig(window_items=3)) as service:
            await service.create("a", "tiny", jsonl("x", *["stuck"] * 9))
            results = service.results("a", 0, follow=True)
            await anext(results)
            while len(generation.submitted) < 4:
                await asyncio.sleep(0)
            assert (await service.cancel("a")).state in (JobState.CANCELLING, JobState.CANCELLED)
            assert [item async for item in results] == []
            status = service.get("a")
            assert (status.state, status.counts) == (JobState.CANCELLED, ItemCounts(10, succeeded=1))
            assert sorted(generation.left) == sorted(generation.cancelled) == ["job.a.1", "job.a.2", "job.a.3"]
            assert generation.cancelled_too_early == []
            assert (await service.cancel("a")).state is JobState.CANCELLED
            with pytest.raises(NotFoundError):
                await service.cancel("b")

    asyncio.run(test())


def test_an_answer_that_comes_with_the_cancel_is_not_taken(path: Path) -> None:
    async def test() -> None:
        gate = asyncio.Event()

        async def answer(fields: GenerateFields) -> Shown:
            await gate.wait()
            return await echo(fields)

        generation = Generation(answer)
        async with opened(path, generation) as service:
            await service.create("a", "tiny", jsonl("x"))
            while not generation.submitted:
                await asyncio.sleep(0)
            gate.set()  # the item's task is about to go on
            service._execute(CancelItem("a", 0))
            assert [type(item.error) for item in await all_results(service)] == [CancelledError]
        assert generation.left == ["job.a.0"]

    asyncio.run(test())


def test_a_restart_runs_what_is_left_under_the_same_ids_and_seeds(path: Path) -> None:
    async def test() -> None:
        async def answer(fields: GenerateFields) -> Shown:
            return await (echo if fields.prompt == "x" else never)(fields)

        before = Generation(answer)
        async with opened(path, before) as service:
            await service.create("a", "tiny", jsonl("x", "stuck", "stuck"))
            assert (await anext(service.results("a", 0, follow=True))).index == 0
            while len(before.submitted) < 3:
                await asyncio.sleep(0)
        assert sorted(before.left) == ["job.a.1", "job.a.2"] and before.cancelled == []
        after = Generation(echo)
        async with opened(path, after) as service:
            assert sorted(item.cursor for item in await all_results(service)) == [1, 2, 3]
            assert service.get("a").counts == ItemCounts(3, succeeded=3)
        content = {fields.request_id: (fields.prompt, fields.sampling, fields.model) for fields in before.submitted}
        again = {fields.request_id: (fields.prompt, fields.sampling, fields.model) for fields in after.submitted}
        assert again == {name: content[name] for name in ("job.a.1", "job.a.2")}

    asyncio.run(test())


def test_interruptions_of_items_are_counted_and_kept(path: Path) -> None:
    async def test() -> None:
        async with opened(path, Generation(never)) as service:
            await service.create("a", "tiny", jsonl("x", "y"))
            for request_id in ("job.a.1", "job.a.1", "a-clients-own", "job.b.0"):
                service.interrupted(request_id)
            async for status in service.watch("a"):
                if status.counts.interrupted:
                    break
            assert status.counts == ItemCounts(2, running=2, interrupted=1)
        async with opened(path, Generation(never)) as service:
            assert service.get("a").counts.interrupted == 1

    asyncio.run(test())


def test_results_wait_for_the_disk_in_order_and_new_jobs_are_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_service, "STORE_RETRY_S", 0.01)

    async def test() -> None:
        full = False

        def crash_point(point: str) -> None:
            if full and point in ("create.begun", "write.begun"):
                raise OverloadedError("disk full", reason="JOURNAL_UNAVAILABLE")

        service = await JobService.open(path, Generation(echo), JobConfig(window_items=1), crash_point)
        run = asyncio.create_task(service.run())
        full = True
        with pytest.raises(OverloadedError):
            await service.create("b", "tiny", jsonl("x"))
        full = False
        await service.create("a", "tiny", jsonl("x", "y"))
        full = True
        while service.store_error is None:
            await asyncio.sleep(0.001)
        assert await all_results(service, follow=False) == [] and service.get("a").counts.succeeded == 0
        full = False
        assert [item.cursor for item in await all_results(service)] == [1, 2]
        assert service.store_error is None
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)
        await service.close()

    asyncio.run(test())


def test_closing_ends_watchers_and_followers_with_unavailable(path: Path) -> None:
    async def test() -> None:
        async with opened(path, Generation(never)) as service:
            await service.create("a", "tiny", jsonl("x"))
            follower = asyncio.create_task(all_results(service))
            await asyncio.sleep(0.05)
        with pytest.raises(UnavailableError) as caught:
            await follower
        assert caught.value.reason == "DRAINING"

    asyncio.run(test())
