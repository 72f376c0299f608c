"""Batch jobs as a user holds them: submit an input, look a job up, wait for it, read its results.

`Jobs` and `Job` are `client.jobs` of the synchronous client, `AsyncJobs` and `AsyncJob` of the asynchronous one. A
handle is an id and a client: it may be made again anywhere, any time.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path

from echelon.errors import InternalError, InvalidRequestError
from echelon.internal import calls
from echelon.internal.transport import Transport
from echelon.internal.transport_aio import AsyncTransport
from echelon.types import ItemResult, JobStatus

Items = Sequence[str | Mapping[str, object]]
Source = str | os.PathLike[str] | bytes | Items


class Jobs:
    """Batch jobs of a synchronous client."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def submit(self, source: Source, *, job_id: str | None = None, model: str = "") -> Job:
        """Submit a JSONL file (its path or its bytes) or a list of items; see `to_jsonl`.

        The same job_id with the same content gives the same job; with other content, ConflictError.
        """
        created = self._transport.finish(calls.create_job(self._transport.settings, to_jsonl(source), job_id, model))
        return Job(self._transport, created.job_id)

    def get(self, job_id: str) -> Job:
        """A job by its id; NotFoundError if there is none."""
        job = Job(self._transport, job_id)
        job.status()
        return job

    def list(self, *, page_size: int = calls.LIST_PAGE_SIZE) -> Iterator[JobStatus]:
        """Every job, the newest first. They are asked for as they are read, page_size at a time."""
        page_token, more = "", True
        while more:
            page, page_token = self._transport.finish(calls.list_jobs(self._transport.settings, page_token, page_size))
            more = bool(page_token)
            yield from page


class Job:
    """A batch job by its id."""

    def __init__(self, transport: Transport, job_id: str) -> None:
        self._transport = transport
        self.job_id = job_id

    def __repr__(self) -> str:
        return f"Job({self.job_id!r})"

    def status(self) -> JobStatus:
        """The job now."""
        return self._transport.finish(calls.get_job(self._transport.settings, self.job_id))

    def cancel(self) -> JobStatus:
        """Start no more items and end those that run; results so far are kept."""
        return self._transport.finish(calls.cancel_job(self._transport.settings, self.job_id))

    def watch(self, timeout_s: float | None = None) -> Iterator[JobStatus]:
        """The job now and at each change, until it has ended."""
        return self._transport.items(calls.watch_job(self._transport.settings, self.job_id, timeout_s))

    def wait(self, *, timeout_s: float | None = None, progress: bool = False) -> JobStatus:
        """The job once it has ended. progress writes a line to stderr; a timeout raises DeadlineError."""
        last: JobStatus | None = None
        for last in self.watch(timeout_s):
            if progress:
                _show(last)
        return _ended(self.job_id, last)

    def results(self, *, after: int = 0, follow: bool = True) -> Iterator[ItemResult]:
        """Results by rising cursor, from after it; follow waits for later ones until the job has ended."""
        return self._transport.items(calls.job_results(self._transport.settings, self.job_id, after, follow))


class AsyncJobs:
    """Batch jobs of an asynchronous client; each method as in `Jobs`."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    async def submit(self, source: Source, *, job_id: str | None = None, model: str = "") -> AsyncJob:
        call = calls.create_job(self._transport.settings, to_jsonl(source), job_id, model)
        return AsyncJob(self._transport, (await self._transport.finish(call)).job_id)

    async def get(self, job_id: str) -> AsyncJob:
        job = AsyncJob(self._transport, job_id)
        await job.status()
        return job

    async def list(self, *, page_size: int = calls.LIST_PAGE_SIZE) -> AsyncIterator[JobStatus]:
        page_token, more = "", True
        while more:
            call = calls.list_jobs(self._transport.settings, page_token, page_size)
            page, page_token = await self._transport.finish(call)
            more = bool(page_token)
            for job in page:
                yield job


class AsyncJob:
    """A batch job by its id; each method as in `Job`."""

    def __init__(self, transport: AsyncTransport, job_id: str) -> None:
        self._transport = transport
        self.job_id = job_id

    def __repr__(self) -> str:
        return f"AsyncJob({self.job_id!r})"

    async def status(self) -> JobStatus:
        return await self._transport.finish(calls.get_job(self._transport.settings, self.job_id))

    async def cancel(self) -> JobStatus:
        return await self._transport.finish(calls.cancel_job(self._transport.settings, self.job_id))

    def watch(self, timeout_s: float | None = None) -> AsyncIterator[JobStatus]:
        return self._transport.items(calls.watch_job(self._transport.settings, self.job_id, timeout_s))

    async def wait(self, *, timeout_s: float | None = None, progress: bool = False) -> JobStatus:
        last: JobStatus | None = None
        async for last in self.watch(timeout_s):
            if progress:
                _show(last)
        return _ended(self.job_id, last)

    def results(self, *, after: int = 0, follow: bool = True) -> AsyncIterator[ItemResult]:
        return self._transport.items(calls.job_results(self._transport.settings, self.job_id, after, follow))


def to_jsonl(source: Source) -> bytes:
    """The JSONL of a file, of bytes as they are, or of items: mappings in a batch line's form, or bare prompts.

    A bare prompt's custom_id is its place in the list.
    """
    if isinstance(source, bytes):
        return source
    if isinstance(source, str | os.PathLike):
        try:
            return Path(source).read_bytes()
        except OSError as error:
            message = f"cannot read the input {os.fspath(source)}: {error.strerror}"
            raise InvalidRequestError(message, field="source") from error
    lines = []
    for index, item in enumerate(source):
        line = {"custom_id": str(index), "prompt": item} if isinstance(item, str) else dict(item)
        try:
            lines.append(json.dumps(line, ensure_ascii=False, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise InvalidRequestError(f"item {index} is not JSON: {error}", field="source") from error
    return "".join(line + "\n" for line in lines).encode()


def progress_line(job: JobStatus) -> str:
    """A job's counts in one line."""
    counts = job.counts
    done = f"{counts.succeeded + counts.failed}/{counts.total}"
    return f"{job.job_id} {job.state.value}: {done} done, {counts.failed} failed, {counts.running} running"


def _show(job: JobStatus) -> None:
    end = "\n" if job.state.ended else ""
    sys.stderr.write(f"\r\x1b[K{progress_line(job)}{end}" if sys.stderr.isatty() else progress_line(job) + "\n")
    sys.stderr.flush()


def _ended(job_id: str, last: JobStatus | None) -> JobStatus:
    if last is None or not last.state.ended:
        raise InternalError(f"the server stopped telling about job {job_id} before its end")
    return last
