"""Ray that goes while a new coordinator sorts out what the one before has left there: an error, and tried again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from coordinator import slots
from coordinator.cluster import Cluster
from coordinator.process import Coordinator
from coordinator.ray_watch import RayWatch
from echelon.errors import InternalError

AWAY = ray.exceptions.RpcError("the GCS is gone", rpc_code=14)  # type: ignore[no-untyped-call]


def away(*_: object) -> None:
    raise AWAY


class Agent:
    """It outlives Ray's store, and has a spare and a rank that no replica is asked for."""

    def remote(self) -> asyncio.Future[list[str]]:
        told = asyncio.get_running_loop().create_future()
        told.set_result(["spare/c/0/0/1-1", "rank/c/5/0/1"])
        return told

    @property
    def living(self) -> Agent:
        return self


async def kill(prefix: str, first: str = "") -> None:
    """The agents have done it."""


async def nothing() -> None: ...


SORTING: dict[str, Callable[[Cluster], Awaitable[object]]] = {
    "Ray does not find spare/c/0/0/1-1": lambda cluster: cluster.spares(),
    "Ray forgets no actor": lambda cluster: cluster.end_all("rank/c/0/0/1"),
    "Ray forgets no spare": lambda cluster: cluster.kill(0),
    "Ray does not tell its slots": lambda cluster: cluster.end_surplus(1),
    "Ray takes no slot back": lambda cluster: cluster.reserve.give_back(5),
}


@pytest.mark.parametrize("told", SORTING)
def test_a_ray_that_does_not_answer_is_an_error_of_ours(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that can be waited out, and not the end of the coordinator."""
    monkeypatch.setattr("coordinator.agents.result", lambda answer: answer)
    monkeypatch.setattr(ray, "get_actor", away if "find" in told else lambda name: name)
    table = {"1": {"name": "slot/c/5/0", "state": "PENDING"}}
    monkeypatch.setattr(ray.util, "placement_group_table", away if "tell" in told else lambda: table)
    monkeypatch.setattr(ray.util, "get_placement_group", away)

    def discard_actors(prefix: str, kept: object = ()) -> None:
        if told == f"Ray forgets no {'spare' if prefix.startswith('spare') else 'actor'}":
            raise AWAY

    monkeypatch.setattr(slots, "discard_actors", discard_actors)

    async def work() -> None:
        cluster = Cluster(("c", 1), "h:1", 30.0)
        cluster._nodes.agents["a"] = Agent()
        monkeypatch.setattr(cluster._agents, "kill", kill)
        with pytest.raises(InternalError, match=f"{told}: the GCS is gone"):
            await SORTING[told](cluster)

    asyncio.run(asyncio.wait_for(work(), 30.0))


class Left:
    """What a predecessor left, over a Ray that refuses to sort it out so often."""

    def __init__(self, refusals: int) -> None:
        self.refusals = refusals
        self.done: list[str] = []
        self.reserve = SimpleNamespace(check=self.check, adopt=nothing, run=self.check)

    async def check(self, want: object) -> None: ...

    async def connect(self) -> None:
        self.done.append("connect")

    async def end_surplus(self, replicas: int) -> None:
        if self.refusals:
            self.refusals -= 1
            raise InternalError("Ray takes no slot back")
        self.done.append("end surplus")

    async def adopt(self) -> None:
        self.done.append("adopt")

    async def survivors(self, replica: int) -> frozenset[tuple[int, str]]:
        return frozenset({(replica, "1")})

    def joined(self, survivors: list[frozenset[tuple[int, str]]]) -> None:
        self.done.append(f"joined {len(survivors)}")


def on_ray(left: Left, served: bool) -> None:
    async def watch(*works: Coroutine[Any, Any, None]) -> None:
        for work in works:
            work.close()

    coordinator: Any = Coordinator.__new__(Coordinator)
    coordinator._ray = RayWatch("h:1", served, lambda *event: None, lambda **message: None)
    coordinator._cluster = coordinator._replicas = left
    coordinator._spares = SimpleNamespace(adopt=left.adopt, run=nothing)
    coordinator._config = SimpleNamespace(replicas=2, served=served)
    coordinator._want_of_devices = lambda: None
    coordinator._watch = watch
    asyncio.run(asyncio.wait_for(coordinator._on_ray(), 30.0))


def test_a_cluster_that_has_served_is_not_given_up_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.ray_watch.RETRY_S", 0.001)
    left = Left(refusals=2)
    on_ray(left, served=True)
    assert left.done == ["connect"] * 3 + ["end surplus", "adopt", "joined 2"]


def test_a_first_start_tells_it() -> None:
    with pytest.raises(InternalError, match="takes no slot back"):
        on_ray(Left(refusals=1), served=False)
