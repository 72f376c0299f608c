"""Nodes: who is lost and who is back, and that a node owes its killings before anything is placed there again."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any

import pytest

from coordinator import nodes as nodes_module
from coordinator.nodes import Nodes

AGENTS = {"a": "agent of a", "b": "agent of b"}


class Machines:
    """Agents by node, as far as they answer, and what each was told to kill before it was met."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answering: str) -> None:
        monkeypatch.setattr(nodes_module, "SEEK_S", 0.001)
        self.answering = set(answering)
        self.killed: dict[str, list[frozenset[str]]] = {}
        self.events: list[tuple[str, str, str]] = []
        self.now = 0.0
        self.nodes: Nodes[str] = Nodes(self.meet, 15.0, self.tell, lambda: self.now)

    async def meet(self, node: str, owed: frozenset[str]) -> str | None:
        await asyncio.sleep(0)
        if node not in self.answering:
            return None
        self.killed.setdefault(node, []).append(owed)
        return AGENTS[node]

    def tell(self, kind: str, subject: str, detail: Mapping[str, object]) -> None:
        self.events.append((kind, subject, str(detail.get("reason", ""))))

    def kinds(self) -> list[tuple[str, str]]:
        return [(kind, subject) for kind, subject, _ in self.events]


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 10.0))


async def while_asked() -> None:
    await asyncio.sleep(0.03)


def test_a_node_is_of_use_once_its_agent_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        machines = Machines(monkeypatch, "a")
        machines.nodes.listed({"a": "10.0.0.1", "b": "10.0.0.2"})
        assert machines.nodes.lost == {"a", "b"}
        await machines.nodes.agent("a")
        monkeypatch.setattr(nodes_module, "SETTLE_S", 0.01)
        await machines.nodes.settle()
        assert machines.nodes.agents == {"a": "agent of a"} and machines.nodes.lost == {"b"}
        machines.answering.add("b")
        assert await machines.nodes.agent("b") == "agent of b"
        assert machines.kinds() == [("node.joined", "node/a"), ("node.joined", "node/b")]
        machines.nodes.close()

    run(work())


def test_a_lost_node_owes_what_was_to_be_killed_and_is_of_no_use_before(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        machines = Machines(monkeypatch, "a", "b")
        nodes = machines.nodes
        nodes.listed({"a": "10.0.0.1", "b": "10.0.0.2"})
        await nodes.settle()
        machines.answering.remove("b")
        nodes.lose("b", AGENTS["b"], "its agent is gone")
        nodes.lose("b", AGENTS["b"], "and gone")
        nodes.lose("a", "an agent before this one", "gone")
        assert machines.events[2:] == [("node.lost", "node/b", "its agent is gone")]
        nodes.owe("rank/c/0/")
        nodes.owe("rank/c/1/")
        await while_asked()
        assert nodes.lost == {"b"} and machines.killed == {"a": [frozenset()], "b": [frozenset()]}
        machines.answering.add("b")
        await nodes.agent("b")
        assert machines.killed["b"][-1] == {"rank/c/0/", "rank/c/1/"}
        nodes.lose("b", AGENTS["b"], "again")
        await nodes.agent("b")
        assert machines.killed["b"][-1] == frozenset(), "what was killed is owed no more"
        nodes.close()

    run(work())


def test_what_is_owed_while_the_agent_is_met_is_owed_still(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        machines = Machines(monkeypatch, "a")
        nodes = machines.nodes
        nodes.listed({"a": "10.0.0.1"})
        await asyncio.sleep(0)  # it is being asked
        nodes.owe("rank/c/0/")
        await nodes.agent("a")
        assert machines.killed["a"] == [frozenset(), {"rank/c/0/"}]
        nodes.owe("rank/c/0/")
        nodes.owe("rank/c/0/", "a")
        nodes.lose("a", AGENTS["a"], "it did not answer the order itself")
        await nodes.agent("a")
        assert machines.killed["a"][-1] == {"rank/c/0/"}

    run(work())


def test_silence_is_a_loss_only_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        machines = Machines(monkeypatch, "a")
        nodes = machines.nodes
        nodes.listed({"a": "10.0.0.1"})
        await nodes.settle()
        machines.answering.clear()
        machines.now = 14.0
        nodes.silent("a")
        assert not nodes.lost
        nodes.heard("a")
        machines.now = 28.0
        nodes.silent("a")
        assert not nodes.lost
        machines.now = 29.0
        nodes.silent("a")
        assert nodes.lost == {"a"}
        assert machines.events[-1] == ("node.lost", "node/a", "its agent has not answered for 15 s")
        nodes.close()

    run(work())


def test_a_node_that_ray_gives_up_is_forgotten_with_what_it_owes(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        machines = Machines(monkeypatch, "a", "b")
        nodes = machines.nodes
        nodes.listed({"a": "10.0.0.1", "b": "10.0.0.2"})
        await nodes.settle()
        nodes.listed({"b": "10.0.0.2"})
        assert machines.events[-1] == ("node.lost", "node/a", "Ray has given it up")
        assert not nodes.lost and set(nodes.agents) == {"b"} == set(nodes._heard_s)
        with pytest.raises(KeyError):
            await nodes.agent("a")
        machines.answering.clear()
        nodes.lose("b", AGENTS["b"], "gone")
        waiting = asyncio.ensure_future(nodes.agent("b"))
        await while_asked()
        nodes.listed({})
        with pytest.raises(KeyError):
            await waiting

    run(work())
