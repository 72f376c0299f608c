"""The jobs' shell: runs the job runner's effects in the coordinator's event loop.

Items are submitted like any client's streams, through the Generation seam. All access to the store is on one worker
thread; while one commit is on its way to the disk the next writes gather, and go together (group commit). Knows no
protobuf type: the server translates.
"""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import ParamSpec, Protocol, TypeVar

import structlog

from coordinator.frontend import GenerateFields
from coordinator.jobs import events
from coordinator.jobs.batch_input import batch_digest, check_job_id, parse_batch, parse_item
from coordinator.jobs.runner import JobConfig, JobRunner, item_request_id, item_sampling, parse_item_request_id
from coordinator.jobs.store import JobStore, NewItem, NewJob
from coordinator.requests.nouns import Shown
from echelon.errors import (
    CancelledError,
    EchelonError,
    InternalError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
)
from echelon.types import ItemResult, JobState, JobStatus

ITEM_TIMEOUT_S = 86_400.0  # an item may wait a day in the queue, as OpenAI's batches may
STORE_RETRY_S = 1.0
DEFAULT_PAGE, MAX_PAGE = 100, 1000
RESULTS_PER_READ = 256

logger = structlog.get_logger("jobs")
_P = ParamSpec("_P")
_T = TypeVar("_T")


class Generation(Protocol):
    """What jobs need of the service that answers requests."""

    def submit(self, fields: GenerateFields) -> AsyncIterator[Shown]:
        """Admits the request and yields its events. A refusal is the only one, or is raised.

        A known request_id with the same content attaches again. Leaving the iterator closes the stream.
        """

    def cancel(self, request_ids: Sequence[str]) -> Sequence[str]:
        """Ends these requests, unknown ones left alone; answers those that were running."""

    def now(self) -> float:
        """Unix seconds, by the clock that requests' deadlines are judged by."""


class JobService:
    """All batch jobs. Open it, keep `run()` running, close it."""

    def __init__(self, store: JobStore, thread: ThreadPoolExecutor, generation: Generation, config: JobConfig) -> None:
        self._store, self._thread, self._generation = store, thread, generation
        self._runner = JobRunner(config)
        self._items: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._cancels: set[asyncio.Task[None]] = set()
        self._unwritten: list[events.Write] = []
        self._dirty = asyncio.Event()
        self._watchers: dict[str, set[asyncio.Event]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self.store_error: EchelonError | None = None  # why results are not durable at this moment

    @classmethod
    async def open(
        cls,
        path: Path,
        generation: Generation,
        config: JobConfig,
        crash_point: Callable[[str], None] = lambda point: None,
    ) -> JobService:
        """Opens the store and takes up every job that has not ended."""
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="job-store")
        try:
            store = await asyncio.get_running_loop().run_in_executor(thread, JobStore, path, crash_point)
        except EchelonError:
            thread.shutdown(wait=False)
            raise
        service = cls(store, thread, generation, config)
        service._apply(events.Loaded(await service._on_store(store.load)))
        return service

    async def run(self) -> None:
        """Writes what gathers. Runs until cancelled; ends by itself only by a defect, which it raises."""
        while True:
            await self._dirty.wait()
            batch = tuple(self._unwritten)
            try:
                await self._on_store(self._store.commit, batch)
            except OverloadedError as error:
                # Later results wait behind this batch: cursors must become visible in order.
                self.store_error = error
                logger.error("jobs.store_failed", error=error.message, waiting=len(self._unwritten))
                await asyncio.sleep(STORE_RETRY_S)
                continue
            self.store_error = None
            del self._unwritten[: len(batch)]
            if not self._unwritten:
                self._dirty.clear()
            self._apply(events.Committed(batch))

    async def close(self) -> None:
        """Leaves running items to be taken up by the next coordinator. Cancel run() first."""
        self._closed = True  # a timer that is still set finds nothing to do
        tasks = [*self._items.values(), *self._cancels]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for changed in itertools.chain.from_iterable(self._watchers.values()):
            changed.set()
        await self._on_store(self._store.close)
        self._thread.shutdown()

    async def create(self, job_id: str, model: str, jsonl: bytes) -> JobStatus:
        """Stores a job; when this returns it is durable. The same content under the same id answers the same job.
        Raises InvalidRequestError, ConflictError, or OverloadedError when the store cannot write.
        """
        job_id = job_id or f"job-{uuid.uuid4().hex}"
        check_job_id(job_id)
        items = await asyncio.to_thread(parse_batch, jsonl)
        new = NewJob(
            job_id=job_id,
            digest=batch_digest(model, items),
            model=model,
            items=tuple(NewItem(item.custom_id, item.line) for item in items),
            create_unix_s=self._generation.now(),
        )
        stored = await self._on_store(self._store.create, new)
        self._apply(events.Loaded((stored,)))
        return self.get(job_id)

    def get(self, job_id: str) -> JobStatus:
        """Raises NotFoundError."""
        status = self._runner.status(job_id)
        if status is None:
            missing = f"there is no job {job_id!r}; `echelon batch list` shows those there are"
            raise NotFoundError(missing, reason="JOB_NOT_FOUND", field="name")
        return status

    def list_jobs(self, page_size: int, page_token: str) -> tuple[tuple[JobStatus, ...], str]:
        """Jobs from the newest on, and the token of the next page, empty at the end."""
        if page_size < 0:
            raise InvalidRequestError(f"page_size must be 0 or more, got {page_size}", field="page_size")
        size = min(page_size or DEFAULT_PAGE, MAX_PAGE)
        statuses = self._runner.statuses()
        if page_token:
            statuses = itertools.dropwhile(lambda status: status.job_id != page_token, statuses)
            if next(statuses, None) is None:
                raise InvalidRequestError(f"page_token {page_token!r} is none of ours", field="page_token")
        page = tuple(itertools.islice(statuses, size + 1))
        return page[:size], page[size - 1].job_id if len(page) > size else ""

    async def cancel(self, job_id: str) -> JobStatus:
        """Ends the job. When this returns that is durable, and no further item starts; results so far stay."""
        self.get(job_id)
        self._apply(events.CancelRequested(job_id))
        async with aclosing(self.watch(job_id)) as statuses:
            async for status in statuses:
                if status.state not in (JobState.QUEUED, JobState.RUNNING):
                    break
        return status

    async def watch(self, job_id: str) -> AsyncGenerator[JobStatus, None]:
        """The status now and after each change, until the job has ended. A slow reader skips to the latest."""
        with self._watching(job_id) as changed:
            while True:
                changed.clear()
                status = self.get(job_id)
                yield status
                if status.state.ended:
                    return
                await self._wait(changed)

    async def results(self, job_id: str, after_cursor: int, follow: bool) -> AsyncGenerator[ItemResult, None]:
        """Results by rising cursor; with follow, later ones too, until the job has ended."""
        with self._watching(job_id) as changed:
            while True:
                changed.clear()
                ended = self.get(job_id).state.ended  # before reading: a job ends after its last result
                page = await self._on_store(self._store.results, job_id, after_cursor, RESULTS_PER_READ)
                for result in page:
                    after_cursor = result.cursor
                    yield result
                if page:
                    continue
                if ended or not follow:
                    return
                await self._wait(changed)

    def interrupted(self, request_id: str) -> None:
        """A replica fault sent this request back to be replayed; counted when it is an item of a job."""
        item = parse_item_request_id(request_id)
        if item is not None:
            self._apply(events.Interrupted(*item))

    def _apply(self, event: events.Event) -> None:
        if self._closed:
            return
        for effect in self._runner.step(self._generation.now(), event):
            self._execute(effect)

    def _execute(self, effect: events.Effect) -> None:
        match effect:
            case events.StartItem(job_id, index):
                self._items[job_id, index] = asyncio.create_task(self._run_item(job_id, index))
            case events.CancelItem(job_id, index):
                started = self._items.pop((job_id, index), None)
                if started is None:
                    self._generation.cancel([item_request_id(job_id, index)])
                else:
                    started.cancel()  # at once: an answer that has come meanwhile is not taken any more
                    task = asyncio.create_task(self._cancel_item(job_id, index, started))
                    self._cancels.add(task)
                    task.add_done_callback(self._cancels.discard)
            case events.Persist(write):
                self._unwritten.append(write)
                self._dirty.set()
            case events.Wake(unix_s):
                if self._timer is not None:
                    self._timer.cancel()
                delay_s = max(0.0, unix_s - self._generation.now())
                self._timer = asyncio.get_running_loop().call_later(delay_s, self._apply, events.Tick())
            case events.Changed(job_id):
                for changed in self._watchers.get(job_id, ()):
                    changed.set()

    async def _run_item(self, job_id: str, index: int) -> None:
        outcome: events.Outcome
        try:
            outcome = await self._answer(job_id, index)
        except EchelonError as error:
            outcome = error
        except Exception:
            logger.exception("jobs.item_failed", job_id=job_id, index=index)
            outcome = InternalError(f"item {index} of job {job_id!r} met a defect; the server's log has the rest")
        del self._items[job_id, index]
        self._apply(events.ItemEnded(job_id, index, outcome))

    async def _answer(self, job_id: str, index: int) -> events.Outcome:
        line = await self._on_store(self._store.item_line, job_id, index)
        outcome: events.Outcome = UnavailableError(f"the stream of item {index} ended without an answer")
        async for event in self._generation.submit(self._fields(job_id, index, line)):
            if isinstance(event, events.Outcome):
                outcome = event
        return outcome

    def _fields(self, job_id: str, index: int, line: str) -> GenerateFields:
        item = parse_item(line, index, index + 1)
        return GenerateFields(
            prompt=item.prompt,
            sampling=item_sampling(item.sampling, job_id, index),
            model=item.model or self.get(job_id).model,
            request_id=item_request_id(job_id, index),
            deadline_unix_s=self._generation.now() + ITEM_TIMEOUT_S,
            priority=item.priority,
            cache_salt=item.cache_salt,
        )

    async def _cancel_item(self, job_id: str, index: int, started: asyncio.Task[None]) -> None:
        # First the stream, so that nothing submits the request after it was cancelled.
        await asyncio.wait([started])
        request_id = item_request_id(job_id, index)
        self._generation.cancel([request_id])
        error = CancelledError(f"job {job_id!r} was cancelled", request_id=request_id)
        self._apply(events.ItemEnded(job_id, index, error))

    async def _on_store(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: function(*args, **kwargs))

    @contextmanager
    def _watching(self, job_id: str) -> Iterator[asyncio.Event]:
        changed = asyncio.Event()
        self._watchers.setdefault(job_id, set()).add(changed)
        try:
            yield changed
        finally:
            self._watchers[job_id].discard(changed)
            if not self._watchers[job_id]:
                del self._watchers[job_id]

    async def _wait(self, changed: asyncio.Event) -> None:
        await changed.wait()
        if self._closed:
            raise UnavailableError("the coordinator is going away; ask again", reason="DRAINING")
