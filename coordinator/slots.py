"""Slots: what a cluster holds of Ray, one bundle of one device each, kept through all epochs, and the actors in them.

In the coordinator, in threads: every call blocks on Ray. A rank and its spare take half a bundle each, so that they
share the device. All of it is detached and found again by name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from typing import Any

import ray
from ray.util import scheduling_strategies
from ray.util.placement_group import PlacementGroup

from echelon.errors import InternalError
from worker.actor import AgentActor, RankActor, slot_name

SLOT_TIMEOUT_S = 30.0
SHARE = 0.5  # of a slot's device, for a rank or a spare


def take_slot(cluster: str, replica: int, rank: int, device: str) -> PlacementGroup:
    """The slot of a rank, made if there is none. Raises InternalError when Ray has no room."""
    name, resource = slot_name(cluster, replica, rank), "GPU" if device == "cuda" else "CPU"
    slot: PlacementGroup
    try:
        slot = ray.util.get_placement_group(name)
    except ValueError:
        slot = ray.util.placement_group([{resource: 1}], name=name, lifetime="detached")
    if not slot.wait(timeout_seconds=SLOT_TIMEOUT_S):
        free = ", ".join(f"{name} {count:g}" for name, count in sorted(_free().items()))
        raise InternalError(
            f"Ray has no room for rank {rank} of replica {replica} within {SLOT_TIMEOUT_S:g} s: it needs 1 {resource}, "
            f"free are {free or 'none'}"
        )
    return slot


def create_rank(name: str, slot: PlacementGroup, device: str) -> Any:
    """The actor of a process in the slot."""
    return (
        ray.remote(RankActor)
        .options(
            name=name,
            lifetime="detached",
            max_restarts=0,
            num_cpus=0 if device == "cuda" else SHARE,
            num_gpus=SHARE if device == "cuda" else 0,
            max_concurrency=2,  # asked how it is while it is told to start
            scheduling_strategy=scheduling_strategies.PlacementGroupSchedulingStrategy(slot, 0),
        )
        .remote()
    )


def create_agent(cluster: str, node_id: str, lease_s: float) -> Any:
    """The agent of a node, or the one that is there."""
    return (
        ray.remote(AgentActor)
        .options(
            name=f"agent/{cluster}/{node_id}",
            lifetime="detached",
            get_if_exists=True,
            max_restarts=0,
            num_cpus=0,
            max_concurrency=16,
            scheduling_strategy=scheduling_strategies.NodeAffinitySchedulingStrategy(node_id, soft=False),
        )
        .remote(cluster, lease_s)
    )


def discard_actors(prefix: str, kept: Collection[str] = ()) -> None:
    """Let Ray forget actors whose processes are gone, and ones that it was still starting."""
    for name in ray.util.list_named_actors():
        if name.startswith(prefix) and name not in kept:
            with contextlib.suppress(ValueError):  # it went by itself meanwhile
                ray.kill(ray.get_actor(name))


def _free() -> dict[str, float]:
    resources: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    return {name: count for name, count in resources.items() if name in ("CPU", "GPU")}
