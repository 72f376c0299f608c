"""The nouns of a cluster that a user is answered with: ranks, spares, devices, replicas and what they tell.

Frozen values without behaviour, shared by the SDK and the coordinator, by way of `echelon/types.py`. They know no
protobuf type and no transport: `echelon/convert_cluster.py` translates. Times are unix seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class Rank:
    """One device's process. parameter_bytes and kv_bytes are resident; planned_* is what placement foresaw."""

    replica: int
    pipeline: int
    data: int
    tensor: int
    expert: int
    leader: bool
    pid: int
    node_id: str
    epoch: int
    state: str
    device: str = "cpu"
    parameter_bytes: int = 0
    kv_bytes: int = 0
    planned_parameter_bytes: int = 0
    planned_kv_bytes: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Spare:
    """A process that waits to become a rank of a replica. state: warming or warm.

    on_spare_device: of no replica; rank is the number of the spare device then.
    """

    replica: int
    rank: int
    pid: int
    node_id: str
    state: str
    on_spare_device: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class SpareDevice:
    """A device beside the ranks' own, or one that was taken out. state: free, used or out.

    slot: "device/0", or the rank "0/1" whose own device it was. rank: who has moved to it.
    """

    slot: str
    node_id: str
    state: str
    rank: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Replica:
    """One copy of the model over its ranks; counters count since its epoch began. reason: why it does not serve."""

    index: int
    epoch: int
    state: str
    kv_blocks_total: int
    kv_blocks_referenced: int
    step: int
    kv_blocks_cached: int = 0
    counters: Mapping[str, int] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A served model."""

    name: str
    source: str
    state: str
    dtype: str
    architecture: str
    max_context: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Everything that serves, at one moment. journal: durable, off, or "not durable: " and why."""

    version: str
    term: int
    coordinator_pid: int
    queued: int
    running: int
    parked: int
    models: tuple[Model, ...]
    replicas: tuple[Replica, ...]
    ranks: tuple[Rank, ...]
    spares: tuple[Spare, ...] = ()
    journal: str = "durable"
    spare_devices: tuple[SpareDevice, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertLoad:
    """How often the experts of a layer were chosen since the replica's epoch began.

    rows: by expert. slots: the experts of each rank that holds whole ones, some perhaps on several; () where every rank
    holds a part of each.
    """

    replica: int
    epoch: int
    layer: int
    rows: tuple[int, ...]
    slots: tuple[tuple[int, ...], ...] = ()

    @property
    def max_over_mean(self) -> float:
        """Of the experts; 1 if none was chosen."""
        return _max_over_mean(self.rows)

    @property
    def rank_rows(self) -> tuple[float, ...]:
        """Of each rank that holds whole experts: its experts' rows, divided among the ranks that hold the same one."""
        held = [sum(expert in rank for rank in self.slots) for expert in range(len(self.rows))]
        return tuple(sum(self.rows[expert] / held[expert] for expert in set(rank)) for rank in self.slots)

    @property
    def rank_max_over_mean(self) -> float:
        """Of the ranks; 1 where all have alike many rows."""
        return _max_over_mean(self.rank_rows)


def _max_over_mean(rows: Sequence[float]) -> float:
    total = sum(rows)
    return max(rows) * len(rows) / total if total else 1.0


@dataclass(frozen=True, slots=True)
class ClusterEvent:
    """One decision or observation of the coordinator, in order of sequence."""

    sequence: int
    unix_s: float
    kind: str
    subject: str
    detail: Mapping[str, object]
