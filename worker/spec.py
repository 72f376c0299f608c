"""RankSpec: everything a rank process is told when it is started. The rest comes over its control line.

Written by the coordinator, read in the rank process. Knows neither torch nor Ray.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSpec:
    """coordinator_address is the internal one, host:port. node_id and pid are filled in where the process runs."""

    coordinator_address: str
    cluster: str
    replica: int
    rank: int
    incarnation: str
    device: str
    heartbeat_s: float
    term: int
    node_id: str = ""
    pid: int = 0

    @property
    def name(self) -> str:
        """Unique among all ranks that this cluster ever started."""
        return rank_name(self.cluster, self.replica, self.rank, self.incarnation)

    def to_json(self) -> str:
        """One line; `from_json` reads it back."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, line: str) -> RankSpec:
        """Raises TypeError for unknown or missing fields."""
        return cls(**json.loads(line))


def rank_name(cluster: str, replica: int, rank: int, incarnation: str) -> str:
    """The name a rank goes by in Ray and at its node agent. No part holds a slash."""
    return f"rank/{cluster}/{replica}/{rank}/{incarnation}"


def parse_name(name: str) -> tuple[str, str, int, int, str]:
    """(rank or spare, cluster, replica, rank, incarnation or serial) of `rank_name` and `spare_name`."""
    kind, cluster, replica, rank, last = name.split("/")
    return kind, cluster, int(replica), int(rank), last


def spare_name(cluster: str, replica: int, rank: int, serial: str) -> str:
    """The name of a process that waits in a rank's slot. serial: unlike that of any other in the slot."""
    return f"spare/{cluster}/{replica}/{rank}/{serial}"


def replica_prefix(cluster: str, replica: int) -> str:
    """Begins the name of every rank of a replica, whatever its incarnation."""
    return f"rank/{cluster}/{replica}/"


def spares_prefix(cluster: str, replica: int) -> str:
    """Begins the name of every spare of a replica."""
    return f"spare/{cluster}/{replica}/"


def is_named(name: str, wanted: str) -> bool:
    """Whether a name is the one that is wanted, or among those that a beginning stands for, which ends in a slash, or
    is empty and means all: 2-1 does not mean 2-10."""
    return name == wanted or (wanted[-1:] in ("/", "") and name.startswith(wanted))
