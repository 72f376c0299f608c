"""Who is struck: the processes behind a name, in a cluster whose processes run on this machine.

Ranks and the coordinator are told by the cluster's status; what Ray runs is found among the processes that the
supervisor started. Refuses a cluster of another machine: its numbers would name strangers here.
"""

from __future__ import annotations

import random
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from echelon.errors import ConfigError
from echelon.internal.processes import Process, descendants, listens, parent_of, processes
from echelon.types import Cluster, Rank

VICTIM = r"(?P<role>rank|leader|coordinator|supervisor|spare|node|gcs)(:(?P<number>\d+))?"
NUMBERED = ("rank", "spare", "node")
KNOWN = "rank, rank:N, leader, coordinator, supervisor, spare, spare:N, node, node:N or gcs"
GCS_PROCESS, NODE_PROCESS = "gcs_server", "raylet"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Target:
    """role: of VICTIM; rank 0 of a replica is its leader. name: which one it is. pids: in the order to strike."""

    role: str
    name: str
    pids: tuple[int, ...]


def check_victim(name: str, field: str, where: str = "") -> None:
    """Raises ConfigError for a name that no process can have."""
    match = re.fullmatch(VICTIM, name)
    if not match or (match["number"] and match["role"] not in NUMBERED):
        told = f"victim must be {KNOWN}, got {name!r}"
        raise ConfigError(f"{where}: {told}" if where else told, field=field)


def find(name: str, cluster: Cluster, source: random.Random) -> Target:
    """Who the name means now; the source draws one where it has no number.

    Ranks are counted through all replicas, in each as the mesh counts. Raises ConfigError where there is none.
    """
    match = re.fullmatch(VICTIM, name)
    assert match is not None, "plans are checked when they are read"
    number = int(match["number"]) if match["number"] else None
    match match["role"]:
        case "coordinator":
            return Target(name, name, (cluster.coordinator_pid,))
        case "supervisor":  # with its coordinator, which would end when it does
            return Target(name, name, (_supervisor(cluster), cluster.coordinator_pid))
        case "leader":
            return _rank(_chosen("leader", [rank for rank in cluster.ranks if rank.leader], None, source))
        case "rank":
            return _rank(_chosen("rank", in_order(cluster.ranks), number, source))
        case "spare":
            pid = _chosen("spare", [spare.pid for spare in cluster.spares], number, source)
            return Target("spare", f"spare {pid}", (pid,))
        case "node":
            node_ids = list(dict.fromkeys(rank.node_id for rank in in_order(cluster.ranks)))
            return _node(cluster, _chosen("node", node_ids, number, source))
    gcs = [process.pid for process in ray_processes(cluster) if process.name == GCS_PROCESS]
    return Target("gcs", "gcs", (_chosen("gcs, as the cluster joined a Ray that it did not start:", gcs, 0, source),))


def in_order(ranks: Sequence[Rank]) -> list[Rank]:
    """As the mesh counts, replica by replica."""
    return sorted(ranks, key=lambda rank: (rank.replica, rank.pipeline, rank.data, rank.tensor))


def ray_processes(cluster: Cluster) -> list[Process]:
    """What the supervisor's Ray consists of; nothing where the cluster joined another's. Raises as `find`."""
    return descendants(_supervisor(cluster))


def check_local(address: str, cluster: Cluster) -> None:
    """Raises ConfigError unless the coordinator that answers at the address is a process of this machine.

    Proof is that the process of the pid that it tells listens at that port.
    """
    host, _, port = address.rpartition(":")
    told = f"{address} told of a coordinator with pid {cluster.coordinator_pid}"
    if not _is_own(host.strip("[]")):
        raise ConfigError(
            f"{host} is another machine: chaos signals processes, so run it where they are", field="address"
        )
    if not listens(cluster.coordinator_pid, int(port)):
        raise ConfigError(
            f"{told}, and no such process listens there on this machine: run chaos on the cluster's own, as its user",
            field="address",
        )
    own = {process.pid for process in processes().values() if process.name.startswith("ray::")}
    strangers = [rank for rank in cluster.ranks if rank.pid not in own]
    if strangers:
        raise ConfigError(
            f"{told}, but its rank with pid {strangers[0].pid} is on another machine (node {strangers[0].node_id})",
            field="address",
        )


def _is_own(host: str) -> bool:
    """Whether a name or address is one of this machine's: then it can be bound."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
        for family, kind, protocol, _, address in found:
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
    except OSError:
        return False
    return True


def _rank(rank: Rank) -> Target:
    place = f"rank {rank.replica}/{rank.pipeline}/{rank.data}/{rank.tensor}"
    return Target("leader" if rank.leader else "rank", place, (rank.pid,))


def _supervisor(cluster: Cluster) -> int:
    """0 means everybody to those who list processes, and to those who signal them ourselves."""
    if not (pid := parent_of(cluster.coordinator_pid)):
        told = f"the coordinator with pid {cluster.coordinator_pid} has ended, so its supervisor cannot be found"
        raise ConfigError(told, field="victims")
    return pid


def _node(cluster: Cluster, node_id: str) -> Target:
    """The daemon first, so that it cannot report the deaths of its children."""
    for process in (table := processes()).values():
        if process.name == NODE_PROCESS and f"--node_id={node_id}" in process.arguments():
            under = [each.pid for each in descendants(process.pid, table)]
            return Target("node", f"node {node_id[:8]}", (process.pid, *under))
    raise ConfigError(f"node {node_id}: its {NODE_PROCESS} is not a process of this machine", field="victims")


def _chosen(what: str, among: Sequence[T], number: int | None, source: random.Random) -> T:
    if not among or (number is not None and number >= len(among)):
        name = what if number is None else f"{what} {number}"
        raise ConfigError(f"there is no {name} to strike; there are {len(among)}", field="victims")
    return source.choice(among) if number is None else among[number]
