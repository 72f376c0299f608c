"""A cluster as `status` shows it: one line, and tables of its models, replicas and ranks.

Runs in the user's terminal. Pure: makes what is printed, and prints nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from echelon.cli import output
from echelon.types import Cluster, Spare, SpareDevice


def head_line(address: str, cluster: Cluster) -> str:
    """The coordinator, how many replicas serve, and how many requests it has."""
    ready = sum(replica.state == "ready" for replica in cluster.replicas)
    return (
        f"{address}: echelon {cluster.version}, term {cluster.term}, pid {cluster.coordinator_pid}, "
        f"{ready}/{len(cluster.replicas)} replicas ready, "
        f"{cluster.queued} queued, {cluster.running} running, {cluster.parked} parked{journal_note(cluster)}"
    )


def journal_note(cluster: Cluster) -> str:
    """What is to be said of the journal, nothing while all is well."""
    return "" if cluster.journal in ("durable", "") else f", journal {cluster.journal}"


def model_table(cluster: Cluster) -> Table:
    rows = [(m.name, m.state, m.architecture, m.dtype, m.max_context) for m in cluster.models]
    return output.grid("", ("model", "state", "architecture", "dtype", "context"), rows)


def replica_table(cluster: Cluster, tokens_per_s: Mapping[int, float] | None = None) -> Table:
    """tokens_per_s: by replica; one without an entry has no rate yet."""
    columns = ["replica", "state", "epoch", "step", "KV blocks"]
    rows: list[list[object]] = [
        [
            r.index,
            f"{r.state}: {r.reason}" if r.reason else r.state,
            r.epoch,
            r.step,
            f"{r.kv_blocks_referenced}/{r.kv_blocks_total}",
        ]
        for r in cluster.replicas
    ]
    if tokens_per_s is not None:
        columns += ["KV use", "tokens/s"]
        for row, replica in zip(rows, cluster.replicas, strict=True):
            used = replica.kv_blocks_referenced / replica.kv_blocks_total if replica.kv_blocks_total else 0.0
            rate = tokens_per_s.get(replica.index)
            row += [f"{used:.0%}", "-" if rate is None else f"{rate:.1f}"]
    return output.grid("", columns, rows)


def counter_table(cluster: Cluster) -> Table:
    """What each replica's leader has counted since its epoch began."""
    names = sorted({name for replica in cluster.replicas for name in replica.counters})
    rows = [(name, *(replica.counters.get(name, 0) for replica in cluster.replicas)) for name in names]
    return output.grid("", ("counted", *(f"replica {replica.index}" for replica in cluster.replicas)), rows)


def rank_table(cluster: Cluster) -> Table:
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
    ranks += [(f"{_where(s)} spare", s.state, "", s.pid, s.node_id[:12], "", "") for s in cluster.spares]
    devices = [(_device(d), _state(d), "", "", d.node_id[:12], "", "") for d in cluster.spare_devices]
    return output.grid("", ("rank", "state", "device", "pid", "node", "parameters", "KV cache"), [*ranks, *devices])


def _where(spare: Spare) -> str:
    return f"device/{spare.rank}" if spare.on_spare_device else f"{spare.replica}/{spare.rank}"


def _device(device: SpareDevice) -> str:
    """One that was a rank's own is told apart from the rank."""
    return device.slot if device.slot.startswith("device/") else f"{device.slot} device"


def _state(device: SpareDevice) -> str:
    return f"{device.state} by {device.rank}" if device.rank else device.state
