"""`echelon batch`: submit a file of prompts, follow the job, read its results.

Runs in the user's terminal, over the asynchronous client: see generate.py. Results go to stdout, progress to stderr.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from echelon.aio import AsyncClient
from echelon.cli import output
from echelon.internal.calls import LIST_PAGE_SIZE
from echelon.jobs import AsyncJob, progress_line
from echelon.types import JobState, JobStatus

SOME_FAILED = 3

app = typer.Typer(help="Batch jobs: many prompts under one id, each answered once.", no_args_is_help=True)
JobId = Annotated[str, typer.Argument(metavar="JOB", help="The job's id.")]


@app.command()
def submit(
    file: Annotated[Path, typer.Argument(help="JSONL: OpenAI batch lines, or custom_id with prompt or messages.")],
    job_id: Annotated[str, typer.Option(help="Submitting again under the same id is safe; drawn when empty.")] = "",
    model: Annotated[str, typer.Option(help="The served model, when there are several.")] = "",
    watch: Annotated[bool, typer.Option("--watch", help="Stay until the job has ended.")] = False,
    address: output.Address = None,
    profile: output.Profile = None,
    as_json: output.AsJson = False,
) -> None:
    """Submit a job and print its id.

    Example: echelon batch submit prompts.jsonl --job-id nightly-42 --watch
    """

    async def run(client: AsyncClient) -> None:
        async with client:
            job = await client.jobs.submit(file, job_id=job_id or None, model=model)
            if as_json:
                output.json_line({"job_id": job.job_id})
            else:
                typer.echo(job.job_id)
            if watch:
                await _watch(job, as_json)

    asyncio.run(run(AsyncClient(address, profile=profile)))


@app.command("list")
def list_jobs(
    page_size: Annotated[int, typer.Option(help="Jobs asked for at once; all are listed.")] = LIST_PAGE_SIZE,
    address: output.Address = None,
    profile: output.Profile = None,
    as_json: output.AsJson = False,
) -> None:
    """List every job.

    Example: echelon batch list --json
    """

    async def run(client: AsyncClient) -> list[JobStatus]:
        async with client:
            return [job async for job in client.jobs.list(page_size=page_size)]

    jobs = asyncio.run(run(AsyncClient(address, profile=profile)))
    if as_json:
        output.json_line(jobs)
        return
    rows = [
        (j.job_id, j.state.value, j.counts.total, j.counts.succeeded, j.counts.failed, output.clock(j.create_unix_s))
        for j in jobs
    ]
    output.table("", ("job", "state", "items", "succeeded", "failed", "created"), rows)


@app.command()
def get(
    job_id: JobId, address: output.Address = None, profile: output.Profile = None, as_json: output.AsJson = False
) -> None:
    """Show one job.

    Example: echelon batch get nightly-42
    """

    async def run(client: AsyncClient) -> JobStatus:
        async with client:
            return await (await client.jobs.get(job_id)).status()

    _show(asyncio.run(run(AsyncClient(address, profile=profile))), as_json)


@app.command()
def watch(
    job_id: JobId, address: output.Address = None, profile: output.Profile = None, as_json: output.AsJson = False
) -> None:
    """Follow a job until it has ended; exit 3 if some of its items failed. Ctrl-C leaves the job running.

    Example: echelon batch watch nightly-42
    """

    async def run(client: AsyncClient) -> None:
        async with client:
            await _watch(await client.jobs.get(job_id), as_json)

    asyncio.run(run(AsyncClient(address, profile=profile)))


@app.command()
def cancel(
    job_id: JobId, address: output.Address = None, profile: output.Profile = None, as_json: output.AsJson = False
) -> None:
    """Cancel a job; results so far are kept.

    Example: echelon batch cancel nightly-42
    """

    async def run(client: AsyncClient) -> JobStatus:
        async with client:
            return await (await client.jobs.get(job_id)).cancel()

    _show(asyncio.run(run(AsyncClient(address, profile=profile))), as_json)


@app.command()
def results(
    job_id: JobId,
    file: Annotated[
        typer.FileTextWrite | None, typer.Option("--output", "-o", help="Write here instead of standard output.")
    ] = None,
    after: Annotated[int, typer.Option(help="Only results after this cursor.")] = 0,
    follow: Annotated[bool, typer.Option(help="Wait for later results until the job has ended.")] = True,
    address: output.Address = None,
    profile: output.Profile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Results are JSON lines, with this or without.")] = False,
) -> None:
    """Print results as OpenAI batch output lines, in the order they came; exit 3 if some items failed.

    Example: echelon batch results nightly-42 --output out.jsonl
    """

    async def run(client: AsyncClient) -> int:
        failed = 0
        async with client:
            async for item in (await client.jobs.get(job_id)).results(after=after, follow=follow):
                failed += item.error is not None
                output.json_line(output.openai_result(job_id, item), file)
        return failed

    if asyncio.run(run(AsyncClient(address, profile=profile))):
        raise typer.Exit(SOME_FAILED)


def _show(job: JobStatus, as_json: bool) -> None:
    if as_json:
        output.json_line(job)
        return
    rows = [
        ("state", job.state.value),
        ("model", job.model),
        ("items", progress_line(job).partition(": ")[2]),
        ("interrupted", job.counts.interrupted),
        ("tokens", f"{job.usage.prompt_tokens} prompt, {job.usage.completion_tokens} generated"),
        ("created", output.clock(job.create_unix_s)),
        ("started", output.clock(job.start_unix_s)),
        ("ended", output.clock(job.end_unix_s)),
    ]
    output.table(job.job_id, ("", ""), rows)


async def _watch(job: AsyncJob, as_json: bool) -> None:
    """JSON lines on stdout; else on stderr a bar on a terminal, a line at each change elsewhere."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    last: JobStatus | None = None
    with Progress(*columns, console=console, disable=as_json or not console.is_terminal) as progress:
        bar = progress.add_task(job.job_id, total=None)
        async for last in job.watch():
            done = last.counts.succeeded + last.counts.failed
            progress.update(
                bar, description=f"{job.job_id} {last.state.value}", completed=done, total=last.counts.total
            )
            if as_json:
                output.json_line(last)
            elif not console.is_terminal:
                console.print(progress_line(last), highlight=False, soft_wrap=True)
    if last is None or last.state is JobState.CANCELLED:
        raise typer.Exit(1)
    if last.counts.failed:
        raise typer.Exit(SOME_FAILED)
