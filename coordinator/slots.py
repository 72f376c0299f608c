"""Slots: what a cluster holds of Ray, one bundle of one device each, kept through all epochs, and the actors in them.

In the coordinator, in threads: every call blocks on Ray. A rank and its spare take half a bundle each, so that they
share the device. All of it is detached and found again by name. A slot whose node is lost is given up for another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from typing import Any

import ray
from ray.util import scheduling_strategies
from ray.util.placement_group import PlacementGroup

from coordinator.devices import Slot, who
from echelon.errors import InternalError
from worker.actor import AgentActor, RankActor, parse_slot_name, slot_name
from worker.spec import is_named

SLOT_TIMEOUT_S = 30.0
SLOT_POLL_S = 2.0
NODE_LABEL = "ray.io/node-id"
SHARE = 0.5  # of a slot's device, for a rank or a spare


def take_slot(
    cluster: str, replica: int, rank: int, device: str, lost: Collection[str] = frozenset()
) -> PlacementGroup:
    """That slot, made if there is none, and placed as soon as Ray has room for it on a node that is not lost.

    Ray would move a slot from a dead node too, but only once it believes in the death.
    """
    slot, node = find_slot(cluster, replica, rank)
    if slot is not None:
        if node not in {"", *lost}:
            return slot
        ray.util.remove_placement_group(slot)
    elsewhere = [{NODE_LABEL: f"!in({','.join(sorted(lost))})"}] if lost else None
    fresh: PlacementGroup = ray.util.placement_group(
        [{resource_of(device): 1}],
        name=slot_name(cluster, replica, rank),
        lifetime="detached",
        bundle_label_selector=elsewhere,
    )
    return fresh


def find_slot(cluster: str, replica: int, rank: int) -> tuple[PlacementGroup | None, str]:
    """That slot, None if there is none, and its node. Raises InternalError when Ray does not answer."""
    try:
        slot: PlacementGroup = ray.util.get_placement_group(slot_name(cluster, replica, rank))
        return slot, node_of(slot)
    except ValueError:
        return None, ""
    except ray.exceptions.RayError as error:
        raise InternalError(f"Ray does not tell where {who((replica, rank))} has its slot: {error}") from error


def find_slots(cluster: str) -> dict[Slot, str]:
    """All slots of a cluster, with their nodes, empty while Ray has not placed them. Raises InternalError."""
    try:
        table = ray.util.placement_group_table()
    except ray.exceptions.RayError as error:
        raise InternalError(f"Ray does not tell its slots: {error}") from error
    found = {}
    for told in table.values():
        slot = parse_slot_name(cluster, told["name"])
        if slot is not None and told["state"] != "REMOVED":
            found[slot] = _node(told)
    return found


def give_back(cluster: str, given: Collection[Slot]) -> None:
    """These devices are Ray's again, as far as there are such slots. Raises InternalError when Ray does not answer."""
    try:
        for slot in given:
            with contextlib.suppress(ValueError):
                ray.util.remove_placement_group(ray.util.get_placement_group(slot_name(cluster, *slot)))
    except ray.exceptions.RayError as error:
        raise InternalError(f"Ray takes no slot back: {error}") from error


def devices_of_ray(device: str) -> int:
    """How many there are, of whoever."""
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return int(resources.get(resource_of(device), 0))


def node_of(slot: PlacementGroup) -> str:
    """Where Ray has placed a slot; empty while it has not."""
    return _node(ray.util.placement_group_table(slot))


def shortage(who: str, device: str) -> str:
    """One sentence: what is needed for this one, and what there is."""
    resources: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    free = ", ".join(f"{name} {count:g}" for name, count in sorted(resources.items()) if name in ("CPU", "GPU"))
    return f"Ray has no room for {who}: it needs 1 {resource_of(device)}, free are {free or 'none'}"


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
        if is_named(name, prefix) and name not in kept:
            with contextlib.suppress(ValueError):  # it went by itself meanwhile
                ray.kill(ray.get_actor(name))


def resource_of(device: str) -> str:
    """What Ray calls it."""
    return "GPU" if device == "cuda" else "CPU"


def _node(told: Mapping[str, Any]) -> str:
    return str(told["bundles_to_node_id"].get(0, "")) if told.get("state") == "CREATED" else ""
