"""`echelon status` and `echelon events`: what serves, and what happened.

Runs in the user's terminal, over the asynchronous client: see generate.py.
"""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from echelon.aio import AsyncClient
from echelon.cli import output
from echelon.types import Cluster

STATUS_TIMEOUT_S = 3.0


def status(
    address: output.Address = None,
    profile: output.Profile = None,
    as_json: output.AsJson = False,
) -> None:
    """Show the cluster: models, replicas and ranks. Asks once: nothing listening is an answer too.

    Example: echelon status --address head:50051
    """
    client = AsyncClient(address, profile=profile, timeout_s=STATUS_TIMEOUT_S, max_retries=0)
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
    typer.echo(
        f"{address}: echelon {cluster.version}, term {cluster.term}, pid {cluster.coordinator_pid}, "
        f"{cluster.queued} queued, {cluster.running} running, {cluster.parked} parked"
    )
    models = [(m.name, m.state, m.architecture, m.dtype, m.max_context) for m in cluster.models]
    output.table("", ("model", "state", "architecture", "dtype", "context"), models)
    replicas = [
        (r.index, r.state, r.epoch, r.step, f"{r.kv_blocks_referenced}/{r.kv_blocks_total}") for r in cluster.replicas
    ]
    output.table("", ("replica", "state", "epoch", "step", "KV blocks"), replicas)
    ranks = [
        (
            f"{r.replica}/p{r.pipeline}-d{r.data}-t{r.tensor}" + (" leader" if r.leader else ""),
            r.state,
            r.device,
            r.pid,
            r.node_id[:12],
            output.byte_count(r.parameter_bytes),
            output.byte_count(r.kv_bytes),
        )
        for r in cluster.ranks
    ]
    output.table("", ("rank", "state", "device", "pid", "node", "parameters", "KV cache"), ranks)
