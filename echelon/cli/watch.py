"""`echelon status --watch`: the cluster again and again, with what changed between two looks as rates.

Runs in the user's terminal. A full view on a terminal, a line a look elsewhere, a JSON object a look with --json. A
coordinator that is away is told and looked for again: it may be on its way back.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from dataclasses import dataclass

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from echelon.aio import AsyncClient
from echelon.cli import output
from echelon.cli.view import counter_table, head_line, journal_note, model_table, rank_table, replica_table
from echelon.errors import DeadlineError, EchelonError, UnavailableError
from echelon.types import Cluster

DECODED, ACCEPTED = "decode_rows", "accepted_tokens"  # counters whose sum is that of tokens that were decoded
SERVING = ("ready", "stepping")  # phases of a rank that has loaded


@dataclass(frozen=True, slots=True)
class Look:
    """The cluster at one moment of a steady clock, or why it did not answer."""

    at_s: float
    cluster: Cluster | None = None
    error: EchelonError | None = None


def tokens_per_s(earlier: Look | None, later: Look) -> dict[int, float]:
    """Tokens decoded a second, by replica; none for a replica whose epoch is new, as its counters began again."""
    if earlier is None or earlier.cluster is None or later.cluster is None or later.at_s <= earlier.at_s:
        return {}
    before = {(replica.index, replica.epoch): replica.counters for replica in earlier.cluster.replicas}
    elapsed_s = later.at_s - earlier.at_s
    rates: dict[int, float] = {}
    for replica in later.cluster.replicas:
        counters = before.get((replica.index, replica.epoch))
        if counters is not None and DECODED in replica.counters:
            gained = [replica.counters.get(name, 0) - counters.get(name, 0) for name in (DECODED, ACCEPTED)]
            rates[replica.index] = max(sum(gained), 0) / elapsed_s
    return rates


def line(look: Look, rates: dict[int, float]) -> str:
    """A look in one line."""
    cluster = look.cluster
    if cluster is None:
        return f"{look.error}; looking again"
    ready = sum(replica.state == "ready" for replica in cluster.replicas)
    ranks = sum(rank.state in SERVING for rank in cluster.ranks)
    used = sum(replica.kv_blocks_referenced for replica in cluster.replicas)
    total = sum(replica.kv_blocks_total for replica in cluster.replicas)
    return (
        f"replicas {ready}/{len(cluster.replicas)} ready, ranks {ranks}/{len(cluster.ranks)} ready, "
        f"{cluster.queued} queued, {cluster.running} running, {cluster.parked} parked, "
        f"KV {used}/{total} blocks, {sum(rates.values()):.1f} tokens/s{journal_note(cluster)}"
    )


def view(address: str, look: Look, rates: dict[int, float]) -> RenderableType:
    """A look as a terminal shows it."""
    cluster = look.cluster
    if cluster is None:
        return Text(f"{address}: {line(look, rates)}")
    tables = (model_table(cluster), replica_table(cluster, rates), counter_table(cluster), rank_table(cluster))
    return Group(Text(head_line(address, cluster)), *tables)


async def watch_cluster(client: AsyncClient, interval_s: float, as_json: bool) -> None:
    """Until it is cancelled."""
    on_terminal = sys.stdout.isatty() and not as_json
    screen = Live(auto_refresh=False) if on_terminal else contextlib.nullcontext()
    earlier: Look | None = None
    async with client:
        with screen as live:
            while True:
                look = await _look(client)
                rates = tokens_per_s(earlier, look)
                if as_json:
                    error = None if look.error is None else look.error.message
                    output.json_line({"cluster": look.cluster, "tokens_per_s": rates, "error": error})
                elif live is None:
                    typer.echo(f"{output.clock(time.time())} {line(look, rates)}")
                else:
                    live.update(view(client.address, look, rates), refresh=True)
                earlier = look
                await asyncio.sleep(interval_s)


async def _look(client: AsyncClient) -> Look:
    try:
        cluster = await client.cluster()
    except (UnavailableError, DeadlineError) as error:
        return Look(time.monotonic(), error=error)
    return Look(time.monotonic(), cluster)
