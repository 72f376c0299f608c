"""`echelon status` and `echelon events`: what serves, and what happened.

Runs in the user's terminal, over the asynchronous client: see generate.py.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Annotated

import typer
from rich.console import Console

from echelon.aio import AsyncClient
from echelon.cli import output
from echelon.cli.view import head_line, model_table, rank_table, replica_table
from echelon.cli.watch import watch_cluster
from echelon.types import Cluster

STATUS_TIMEOUT_S = 3.0


def status(
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Show it again and again, with rates; until Ctrl-C.")
    ] = False,
    interval_s: Annotated[float, typer.Option("--interval", help="Seconds between looks of --watch.", min=0.1)] = 1.0,
    address: output.Address = None,
    profile: output.Profile = None,
    as_json: output.AsJson = False,
) -> None:
    """Show the cluster: models, replicas and ranks. Without --watch asks once: nothing listening is an answer too.

    Example: echelon status --watch
    """
    client = AsyncClient(address, profile=profile, timeout_s=STATUS_TIMEOUT_S, max_retries=0)
    if watch:
        asyncio.run(watch_cluster(client, interval_s, as_json))
        return
    cluster = asyncio.run(_cluster(client))
    if as_json:
        output.json_line(cluster)
    else:
        _show(client.address, cluster)


def events(
    after: Annotated[int, typer.Option(help="Only events after this sequence.")] = 0,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for new events.")] = False,
    address: output.Address = None,
    profile: output.Profile = None,
    as_json: output.AsJson = False,
) -> None:
    """Print the coordinator's decisions and observations, oldest first.

    Example: echelon events --follow
    """
    asyncio.run(_events(AsyncClient(address, profile=profile), after, follow, as_json))


async def _cluster(client: AsyncClient) -> Cluster:
    async with client:
        return await client.cluster()


async def _events(client: AsyncClient, after: int, follow: bool, as_json: bool) -> None:
    async with client:
        async for event in client.events(after=after, follow=follow):
            if as_json:
                output.json_line(event)
            else:
                detail = " ".join(f"{name}={value}" for name, value in event.detail.items())
                head = f"{event.sequence:>6} {output.clock(event.unix_s)}"
                typer.echo(f"{head} {event.kind} {event.subject} {detail}".rstrip())


def _show(address: str, cluster: Cluster) -> None:
    typer.echo(head_line(address, cluster))
    console = Console(width=None if sys.stdout.isatty() else output.PIPE_WIDTH)
    for table in (model_table(cluster), replica_table(cluster), rank_table(cluster)):
        console.print(table)
