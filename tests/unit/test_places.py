"""The search for a slot, over a Ray of a few places: nodes that are lost, room that is short, and whose turn it is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Coroutine
from dataclasses import dataclass
from typing import Any

import pytest
import ray

from coordinator import places, slots
from coordinator.cluster import Cluster
from coordinator.devices import NONE_MOVED, Devices
from coordinator.nodes import Tell
from echelon.errors import InternalError


@dataclass(eq=False)
class Slot:
    """A placement group. node: empty while it is not placed."""

    ray: FewPlaces
    avoided: Collection[str]
    node: str = ""

    def wait(self, timeout_s: float) -> bool:
        self.ray.place()
        time.sleep(timeout_s)
        return bool(self.node)


class FewPlaces:
    """Ray: free places by node, and slots by replica and rank."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **free: int) -> None:
        self.free = free
        self.slots: dict[tuple[int, int], Slot] = {}
        self.told: list[str] = []
        for name in ("find_slot", "find_slots", "take_slot", "give_back", "shortage"):
            monkeypatch.setattr(slots, name, getattr(self, name))
        monkeypatch.setattr(slots, "SLOT_POLL_S", 0.01)
        monkeypatch.setattr(slots, "node_of", lambda slot: slot.node)
        monkeypatch.setattr(places, "AGENT_POLL_S", 0.01)
        self.listed = 0
        self.connect()

    def connect(
        self,
        devices: Devices = NONE_MOVED,
        persist: Callable[[Devices], None] = lambda devices: None,
        tell: Tell = lambda *event: None,
    ) -> None:
        """Another coordinator's."""
        self.cluster = Cluster(("c0ffee", 1), "h:1", 30.0, tell, devices, persist)
        self.cluster._nodes._addresses.update(dict.fromkeys(self.free, "10.0.0.1"))
        self.cluster._nodes.agents.update(dict.fromkeys(self.free, object()))
        self.cluster._agents.list_nodes = self.list_nodes  # type: ignore[method-assign]

    async def list_nodes(self) -> None:
        self.listed += 1
        self.cluster._nodes._addresses.update(dict.fromkeys(self.free, "10.0.0.1"))

    def place(self) -> None:
        for slot in self.slots.values():
            for node, free in self.free.items():
                if not slot.node and free and node not in slot.avoided:
                    slot.node, self.free[node] = node, free - 1

    def find_slot(self, cluster: str, replica: int, rank: int) -> tuple[Slot | None, str]:
        slot = self.slots.get((replica, rank))
        return slot, "" if slot is None else slot.node

    def take_slot(self, cluster: str, replica: int, rank: int, device: str, lost: Collection[str]) -> Slot:
        slot = self.slots.get((replica, rank))
        if slot is not None and slot.node not in {"", *lost}:
            return slot
        self.remove(replica, rank)
        self.slots[replica, rank] = Slot(self, lost)
        self.place()
        return self.slots[replica, rank]

    def remove(self, replica: int, rank: int) -> None:
        slot = self.slots.pop((replica, rank), None)
        if slot is not None and slot.node:
            self.free[slot.node] += 1

    def find_slots(self, cluster: str) -> dict[tuple[int, int], str]:
        self.place()
        return {key: slot.node for key, slot in self.slots.items()}

    def give_back(self, cluster: str, given: Collection[tuple[int, int]]) -> None:
        for slot in given:
            self.remove(*slot)

    def shortage(self, who: str, device: str) -> str:
        return f"no room for {who}"

    async def wanted(self, replica: int, rank: int) -> str:
        return (await self.cluster._places.take(replica, rank, "cpu", self.told.append)).node  # type: ignore[attr-defined,no-any-return]


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 10.0))


def test_a_slot_moves_off_a_lost_node_and_others_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        ray = FewPlaces(monkeypatch, a=1, b=1, c=1)
        assert [await ray.wanted(0, 0), await ray.wanted(0, 1)] == ["a", "b"]
        del ray.cluster._nodes.agents["b"]  # Ray believes in it and would place there: its place is free
        assert [await ray.wanted(0, 0), await ray.wanted(0, 1)] == ["a", "c"]

    run(work())


def test_a_node_that_comes_back_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        ray = FewPlaces(monkeypatch, a=1)
        agent = ray.cluster._nodes.agents.pop("a")
        waiting = asyncio.create_task(ray.wanted(0, 0))
        while not ray.told:
            await asyncio.sleep(0.01)
        assert not waiting.done() and set(ray.told) == {
            "no room for rank 0 of replica 0; nodes whose agent does not answer: 1"
        }
        ray.cluster._nodes.agents["a"] = agent
        assert await waiting == "a"

    run(work())


def test_a_node_that_has_just_joined_is_of_use_once_its_agent_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray places slots on a node before anybody else has heard of it."""

    async def work() -> None:
        ray = FewPlaces(monkeypatch, a=1)
        assert await ray.wanted(0, 0) == "a"
        ray.free["b"] = 1
        waiting = asyncio.create_task(ray.wanted(0, 1))
        while len(ray.told) < 2:
            await asyncio.sleep(0.01)
        assert not waiting.done() and ray.listed and ray.free["b"] == 1, "its slot has been given back"
        assert ray.told[-1] == "no room for rank 1 of replica 0; nodes whose agent does not answer: 1"
        ray.cluster._nodes.agents["b"] = object()
        assert await waiting == "b"

    run(work())


def test_a_spare_that_ray_has_no_answer_for_is_an_error_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams of ranks that live need no Ray, and their coordinator must not end for a spare's sake."""

    def get_placement_group(name: str) -> None:
        raise ray.exceptions.RpcError("the GCS is gone", rpc_code=14)  # type: ignore[no-untyped-call]

    monkeypatch.setattr(ray.util, "get_placement_group", get_placement_group)

    async def work() -> None:
        cluster = Cluster(("c0ffee", 1), "h:1", 30.0)
        with pytest.raises(InternalError, match="where rank 2 of replica 0 has its slot: the GCS is gone"):
            await cluster.launch_spare("spare/c0ffee/0/2/1-1", 0, 2, "cpu")

    run(work())


def test_a_first_start_does_not_wait_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "SLOT_TIMEOUT_S", 0.05)

    async def work() -> None:
        ray = FewPlaces(monkeypatch, a=0)
        with pytest.raises(InternalError, match="no room for rank 0 of replica 0"):
            await ray.cluster._places.take(0, 0, "cpu")

    run(work())


def test_of_two_replicas_that_lack_room_the_first_gets_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would hold one of the two places, and wait for the other's."""

    async def work() -> None:
        ray = FewPlaces(monkeypatch, a=2)
        assert [await ray.wanted(0, 0), await ray.wanted(1, 0)] == ["a", "a"]
        second = asyncio.create_task(ray.wanted(1, 1))
        while not ray.told:
            await asyncio.sleep(0.01)
        assert not second.done()
        assert await ray.wanted(0, 1) == "a", "the second replica has given its place back"
        again = asyncio.create_task(ray.wanted(1, 0))
        await asyncio.sleep(0.1)
        assert not again.done() and not second.done()
        ray.free["b"] = 2
        ray.cluster._nodes._addresses["b"], ray.cluster._nodes.agents["b"] = "10.0.0.2", object()
        assert [await again, await second] == ["b", "b"]

    run(work())


def test_a_slot_that_another_rank_of_its_replica_gave_back_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is gone while its rank looks at it, and the replica before has its room before that rank looks up."""

    async def work() -> None:
        ray = FewPlaces(monkeypatch, a=0)
        ray.cluster._nodes._addresses["b"] = "10.0.0.2"
        ray.free["b"] = 0
        ray.cluster._nodes.agents["b"] = object()
        waiting = asyncio.create_task(ray.wanted(1, 0))
        while not ray.told:
            await asyncio.sleep(0.01)
        monkeypatch.setattr(slots, "SLOT_POLL_S", 0.2)
        await asyncio.sleep(0.02)  # it looks, for long
        ray.cluster._places._lacking.add((0, 0))
        other = asyncio.create_task(ray.wanted(1, 1))
        while ray.slots:
            await asyncio.sleep(0.01)
        ray.cluster._places._lacking.clear()
        ray.free["b"] = 2
        assert [await waiting, await other] == ["b", "b"]

    run(work())


def test_a_wait_that_is_given_up_holds_nobody_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        ray = FewPlaces(monkeypatch, a=0)
        first = asyncio.create_task(ray.wanted(0, 0))
        while not ray.told:
            await asyncio.sleep(0.01)
        first.cancel()
        await asyncio.wait([first])
        ray.give_back("c0ffee", [(0, 0)])
        ray.free["a"] = 1
        assert await ray.wanted(1, 0) == "a"

    run(work())
