"""Agents over handles that answer, fail or hang: who does not answer loses its node, and owes what it was told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any

import pytest
import ray

from coordinator import agents as agents_module
from coordinator import nodes as nodes_module
from coordinator.agents import Agents
from coordinator.fences import SupersededError

GONE = ray.exceptions.ActorUnavailableError("the connection is refused", None)


class Handle:
    """Of an agent's actor. answer: what is left after a kill, or a call raises; None for one that hangs."""

    def __init__(self, node: str, answer: object = ()) -> None:
        self.node = node
        self.answer: object = answer
        self.term = 0
        self.orders: list[tuple[object, ...]] = []
        self.renew, self.kill = Method(self, "renew"), Method(self, "kill")


class Method:
    def __init__(self, of: Handle, name: str) -> None:
        self._of = of
        self._name = name
        self._obeys = True

    def remote(self, term: int, *arguments: object) -> Method:
        self._of.orders.append((self._name, *arguments))
        self._obeys = term >= self._of.term
        return self

    def future(self) -> Future[object]:
        told: Future[object] = Future()
        if isinstance(self._of.answer, Exception):
            told.set_exception(self._of.answer)
        elif self._of.answer is not None and self._name == "kill":
            told.set_result(self._of.answer if self._obeys else None)
        elif self._of.answer is not None:
            told.set_result(self._obeys)
        return told


class World:
    """Ray: its nodes, their agents, and the actors that it was told to end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *nodes: str) -> None:
        self.handles = {node: Handle(node) for node in nodes}
        self.alive = list(nodes)
        self.killed: list[Handle] = []
        self.now = 0.0
        self.kinds: list[tuple[str, str]] = []
        monkeypatch.setattr(nodes_module, "SEEK_S", 0.01)
        monkeypatch.setattr(agents_module, "KILL_TIMEOUT_S", 0.05)
        monkeypatch.setattr(agents_module.ask, "__kwdefaults__", {"timeout_s": 0.05})
        monkeypatch.setattr(agents_module, "create_agent", lambda cluster, node, lease_s: self.handles[node])
        monkeypatch.setattr(ray, "nodes", self.nodes)
        monkeypatch.setattr(ray, "kill", self.killed.append)
        self.agents = Agents(
            ("c", 7), 0.6, self.call, lambda kind, subject, _: self.kinds.append((kind, subject)), self.clock
        )

    def clock(self) -> float:
        return self.now

    def nodes(self) -> list[dict[str, object]]:
        return [
            {"NodeID": node, "NodeManagerAddress": "10.0.0.1", "Alive": node in self.alive} for node in self.handles
        ]

    async def call(self, function: Callable[..., Any], *positional: object) -> Any:
        return function(*positional)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 10.0))


@pytest.mark.parametrize("answer", [GONE, None], ids=["refuses", "hangs"])
def test_a_kill_that_is_not_confirmed_loses_the_node_and_is_owed(
    monkeypatch: pytest.MonkeyPatch, answer: object
) -> None:
    async def work() -> None:
        world = World(monkeypatch, "a", "b")
        agents = world.agents
        await agents.list_nodes()
        await agents.nodes.settle()
        world.handles["b"].answer = answer
        await agents.kill("rank/c/0/", "rank/c/0/1/")
        assert agents.nodes.lost == {"b"}
        assert world.handles["a"].orders[-1] == ("kill", "rank/c/0/", "rank/c/0/1/")
        await agents.kill("rank/c/1/")
        world.handles["b"] = again = Handle("b")
        await agents.of("b")
        assert again.orders == [("renew", 0.6), ("kill", "rank/c/0/", ""), ("kill", "rank/c/1/", "")]
        assert world.kinds[2:] == [("node.lost", "node/b"), ("node.joined", "node/b")]

    run(work())


def test_what_lives_on_is_killed_again_and_keeps_its_node_from_use(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        world = World(monkeypatch, "a")
        world.handles["a"].answer = ["rank/c/0/0/1"]  # left over
        world.agents.nodes.listed({"a": "10.0.0.1"})
        world.agents.nodes.owe("rank/c/0/")
        while len([order for order in world.handles["a"].orders if order[0] == "kill"]) < 3:
            await asyncio.sleep(0.01)
            assert world.agents.nodes.lost == {"a"}
        world.handles["a"].answer = []
        await world.agents.of("a")

    run(work())


def test_an_agent_that_hangs_is_ended_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        world = World(monkeypatch, "a")
        stuck = world.handles["a"]
        stuck.answer = None
        await world.agents.list_nodes()
        while not world.killed:
            await asyncio.sleep(0.01)
        assert world.killed[0] is stuck
        world.handles["a"] = Handle("a")
        await world.agents.of("a")

    run(work())


def test_a_lease_that_cannot_be_renewed_loses_the_node_at_once_or_in_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        world = World(monkeypatch, "a", "b", "c")
        agents = world.agents
        await agents.list_nodes()
        await agents.nodes.settle()
        world.handles["b"].answer, world.handles["c"].answer = GONE, None
        await agents.renew()
        assert agents.nodes.lost == {"b"}, "c may only be slow"
        world.now = 0.3
        await agents.renew()
        assert agents.nodes.lost == {"b", "c"}
        assert set(agents.nodes.agents) == {"a"}
        world.alive.remove("b")
        await agents.renew()
        assert agents.nodes.lost == {"c"}
        agents.nodes.close()

    run(work())


def test_a_ray_that_does_not_answer_is_silent_while_agents_are_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        world = World(monkeypatch, "a")
        await world.agents.list_nodes()
        await world.agents.nodes.settle()

        def away() -> list[dict[str, object]]:
            raise GONE

        monkeypatch.setattr(ray, "nodes", away)
        world.now = 40.0
        before = len(world.handles["a"].orders)
        await world.agents.renew()
        assert world.agents.ray_silent_s == 40.0 and len(world.handles["a"].orders) == before + 1
        monkeypatch.setattr(ray, "nodes", world.nodes)
        await world.agents.renew()
        assert world.agents.ray_silent_s == 0.0

    run(work())


@pytest.mark.parametrize("order", ["kill", "renew", "meet"])
def test_one_that_was_superseded_gives_no_more_orders(monkeypatch: pytest.MonkeyPatch, order: str) -> None:
    """Of any agent: the refusal of one tells that all the others are a successor's too."""

    async def work() -> None:
        world = World(monkeypatch, "a", "b")
        agents = world.agents
        world.handles["b"].term = 8 if order == "meet" else 0
        await agents.list_nodes()
        await agents.nodes.settle()
        world.handles["b"].term = 8
        if order == "renew":
            with pytest.raises(SupersededError, match="a later coordinator than this one, of term 7"):
                await agents.renew()
        world.handles["a"].orders.clear()
        with pytest.raises(SupersededError):
            await agents.kill("rank/c/0/")
        assert order == "kill" or world.handles["a"].orders == []
        assert world.kinds.count(("node.lost", "node/b")) == 0, "it is no less alive for that"

    run(work())
