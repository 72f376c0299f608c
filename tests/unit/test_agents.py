"""Agents over handles that answer, fail or hang: who does not answer loses its node, and owes what it was told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
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
        self.hanging: list[asyncio.Future[object]] = []
        self.renew, self.kill = Method(self, "renew"), Method(self, "kill")
        self.deaths = Polls()


class Polls:
    """Each is answered when the test does so."""

    def __init__(self) -> None:
        self.open: list[asyncio.Future[list[str]]] = []

    def remote(self, timeout_s: float) -> asyncio.Future[list[str]]:
        self.open.append(asyncio.get_running_loop().create_future())
        return self.open[-1]


class Method:
    def __init__(self, of: Handle, name: str) -> None:
        self._of = of
        self._name = name

    def remote(self, term: int, *arguments: object) -> asyncio.Future[object]:
        """The answer. It is there at once or never: no deadline can pass meanwhile, however busy the machine."""
        self._of.orders.append((self._name, *arguments))
        obeys, told = term >= self._of.term, asyncio.get_running_loop().create_future()
        if isinstance(self._of.answer, Exception):
            told.set_exception(self._of.answer)
        elif self._of.answer is None:
            self._of.hanging.append(told)
        elif self._name == "kill":
            told.set_result(self._of.answer if obeys else None)
        else:
            told.set_result(obeys)
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
        monkeypatch.setattr(agents_module, "result", lambda answer: answer)
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


def test_one_question_for_all_nodes_is_under_way_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each blocks a thread for as long as Ray does not answer; what it answers late is heard."""

    async def work() -> None:
        world = World(monkeypatch, "a")
        agents, asked, answers = world.agents, [], asyncio.Event()

        async def call(function: Callable[..., Any], *positional: object) -> Any:
            asked.append(function)
            await answers.wait()
            return function(*positional)

        monkeypatch.setattr(agents, "_in_thread", call)
        monkeypatch.setattr(agents, "_lease_s", 0.03)
        world.now = 40.0
        for _ in range(3):
            await agents.renew()
        assert asked == [world.nodes] and agents.ray_silent_s == 40.0
        answers.set()
        await agents.renew()
        assert agents.ray_silent_s == 0.0
        await agents.nodes.agent("a")

    run(work())


def test_a_late_answer_of_an_agent_that_is_gone_says_nothing_of_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is told to kill what the first one has not."""

    async def work() -> None:
        world = World(monkeypatch, "a")
        agents, gone = world.agents, world.handles["a"]
        await agents.list_nodes()
        await agents.nodes.settle()
        monkeypatch.setattr(agents_module, "KILL_TIMEOUT_S", 60.0)
        gone.answer = None
        killing = asyncio.create_task(agents.kill("rank/c/0/"))
        while not gone.hanging:
            await asyncio.sleep(0)
        world.handles["a"] = again = Handle("a")
        agents.nodes.lose("a", gone, "it was not renewed")
        await agents.of("a")
        gone.hanging[0].set_exception(GONE)
        await killing
        assert world.kinds == [("node.joined", "node/a"), ("node.lost", "node/a"), ("node.joined", "node/a")]
        assert again.orders == [("renew", 0.6), ("kill", "rank/c/0/", "")]

    run(work())


def test_deaths_are_told_of_every_agent_and_of_one_that_follows_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agents_module, "LOOK_S", 0.01)

    async def work() -> None:
        world = World(monkeypatch, "a", "b")
        agents, gone = world.agents, world.handles["b"]
        await agents.list_nodes()
        await agents.nodes.settle()
        deaths = agents.deaths()
        told = asyncio.ensure_future(anext(deaths))
        while not gone.deaths.open:
            await asyncio.sleep(0)
        world.handles["b"] = again = Handle("b")
        gone.deaths.open[0].set_exception(GONE)
        while not again.deaths.open:
            await asyncio.sleep(0)
        assert ("node.lost", "node/b") in world.kinds
        again.deaths.open[0].set_result(["rank/c/0/1/7", "rank/c/0/2/7"])
        assert [await told, await anext(deaths)] == ["rank/c/0/1/7", "rank/c/0/2/7"]
        asking = asyncio.ensure_future(anext(deaths))
        while len(again.deaths.open) < 2:
            await asyncio.sleep(0)
        world.handles["b"] = Handle("b")
        agents.nodes.lose("b", again, "it does not kill")
        while not again.deaths.open[1].cancelled():
            await asyncio.sleep(0)
        asking.cancel()
        await asyncio.wait([asking])
        assert world.handles["a"].deaths.open[0].cancelled()
        agents.nodes.close()

    run(work())
