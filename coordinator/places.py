"""Places: the search for a slot on a node that is not lost, however long it takes, and whose turn it is meanwhile.

On the coordinator's loop, for `coordinator/cluster.py`. Of several replicas that lack room the first is given all there
is, and the others wait without a slot: two that each held half of what is left would wait for ever for the other's.
A rank whose node is lost, or that finds no room, moves to a spare device if there is one (`coordinator/reserve.py`).
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable

from ray.util.placement_group import PlacementGroup

from coordinator import slots
from coordinator.agents import Agents, InThread
from coordinator.reserve import Reserve
from echelon.errors import InternalError

AGENT_POLL_S = 0.2


class Places:
    """Of one cluster."""

    def __init__(self, cluster: str, agents: Agents, in_thread: InThread, reserve: Reserve) -> None:
        self._cluster = cluster
        self._agents = agents
        self._nodes = agents.nodes
        self._in_thread = in_thread
        self._reserve = reserve
        self._lacking: set[tuple[int, int]] = set()  # replica and rank
        self._given_back: Counter[int] = Counter()  # by replica, how often all its slots were

    async def take(
        self, replica: int, rank: int, device: str, no_room: Callable[[str], None] | None = None
    ) -> PlacementGroup:
        """The slot of a rank, once there is room for it.

        no_room is told every few seconds why there is none; without it InternalError is raised after SLOT_TIMEOUT_S.
        """
        began_s = time.monotonic()
        taken_as: tuple[frozenset[str], int] | None = None
        try:
            while True:
                if no_room is not None and any(other < replica for other, _ in self._lacking):
                    await self._reserve.give_back(replica)
                    self._given_back[replica] += 1
                    no_room("a replica before it lacks room too")
                    await asyncio.sleep(slots.SLOT_POLL_S)
                    continue
                now = self._nodes.lost, self._given_back[replica]
                if taken_as != now:  # a node that was avoided may be good again, another is lost, or the slot is gone
                    taken_as = now
                    await self._off_a_lost_node(replica, rank)
                    place = self._reserve.slot_of(replica, rank)
                    slot = await self._in_thread(slots.take_slot, self._cluster, *place, device, now[0])
                placed = await self._in_thread(slot.wait, slots.SLOT_POLL_S)
                if placed and await self._has_agent(slot):
                    return slot
                if not placed and no_room and await self._reserve.leave(replica, rank, "there is no other room"):
                    taken_as = None
                    continue
                waited_s = time.monotonic() - began_s
                shortage = await self._in_thread(slots.shortage, f"rank {rank} of replica {replica}", device)
                if away := len(self._nodes.lost):
                    shortage += f"; nodes whose agent does not answer: {away}"
                if held := len(self._reserve.free):
                    shortage += f"; held as spare devices: {held}"
                if no_room is not None:
                    self._lacking.add((replica, rank))
                    no_room(shortage)
                elif waited_s >= slots.SLOT_TIMEOUT_S:
                    raise InternalError(f"for {waited_s:.0f} s {shortage}")
        finally:
            self._lacking.discard((replica, rank))

    async def _off_a_lost_node(self, replica: int, rank: int) -> None:
        """To a spare device, at once: Ray may still believe in the node, or have no other room."""
        if self._reserve.free:
            slot, node = await self._in_thread(slots.find_slot, self._cluster, *self._reserve.slot_of(replica, rank))
            if slot is not None and node in {"", *self._nodes.lost}:
                await self._reserve.leave(replica, rank, "its node is lost")

    async def _has_agent(self, slot: PlacementGroup) -> bool:
        """Whether its node has one that answers. A node that has just joined gets it, and counts as lost until then."""
        node = await self._in_thread(slots.node_of, slot)
        if node not in self._nodes.agents:
            await self._agents.list_nodes()
            await asyncio.sleep(AGENT_POLL_S)
        return node in self._nodes.agents
